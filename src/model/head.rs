//! Next-token log-probabilities without the vocabulary's logits ever being whole.
//!
//! libtorch's Rust binding has no autograd function of one's own. The same effect comes from one product: the value `v` of
//! a chunk and its gradient `g` towards the hidden state are computed at once, and what is returned is
//! `v + sum(hidden * g) - sum(hidden * g).detach()`, whose value is `v` and whose derivative is `g`. That works because the
//! value of a token depends on that token's hidden state alone, and it lets the chunk's logits go at once.

use tch::{Kind, Tensor};

use super::causal_lm::CausalLm;
use crate::{Error, Result, tensor::is_recorded};

/// Logits of so many numbers exist at a time: 64 MiB in float32.
pub(super) const CHUNK: i64 = 1 << 24;

/// `chunk` is [`CHUNK`], but for tests.
pub(super) fn log_probs<M: CausalLm + ?Sized>(model: &M, hidden: &Tensor, ids: &Tensor, chunk: i64) -> Result<Tensor> {
    check(hidden, ids.size().first().copied().unwrap_or(0), "ids")?;
    per_token(model, hidden, chunk, |rows, from, len| {
        let logits = model.logits(rows)?.f_to_kind(model.master_kind())?;
        let ids = ids.f_narrow(0, from, len)?.f_unsqueeze(1)?;
        let log_probs = logits.f_log_softmax(-1, None::<Kind>)?;
        Ok(log_probs.f_gather(1, &ids, false)?.f_squeeze_dim(1)?)
    })
}

/// `chunk` is [`CHUNK`], but for tests.
pub(super) fn log_complements<M: CausalLm + ?Sized>(
    model: &M,
    hidden: &Tensor,
    ids: &Tensor,
    chunk: i64,
) -> Result<Tensor> {
    check(hidden, ids.size().first().copied().unwrap_or(0), "ids")?;
    per_token(model, hidden, chunk, |rows, from, len| {
        let logits = model.logits(rows)?.f_to_kind(model.master_kind())?;
        let ids = ids.f_narrow(0, from, len)?.f_unsqueeze(1)?;
        let others = logits.f_scatter_value(1, &ids, f64::NEG_INFINITY)?;
        Ok(others.f_logsumexp([-1].as_slice(), false)?.f_sub(&logits.f_logsumexp([-1].as_slice(), false)?)?)
    })
}

/// `chunk` is [`CHUNK`], but for tests.
pub(super) fn kl<M: CausalLm + ?Sized>(model: &M, hidden: &Tensor, reference: &Tensor, chunk: i64) -> Result<Tensor> {
    check(hidden, reference.size().first().copied().unwrap_or(0), "reference hidden states")?;
    let reference = reference.f_detach()?;
    per_token(model, hidden, chunk, |rows, from, len| {
        let distribution = |states: &Tensor| -> Result<Tensor> {
            Ok(model.logits(states)?.f_to_kind(model.master_kind())?.f_log_softmax(-1, None::<Kind>)?)
        };
        let reference = {
            let _guard = tch::no_grad_guard();
            distribution(&reference.f_narrow(0, from, len)?)?
        };
        let ratio = reference.f_sub(&distribution(rows)?)?;
        Ok(reference.f_exp()?.f_mul(&ratio)?.f_sum_dim_intlist([-1].as_slice(), false, None::<Kind>)?)
    })
}

/// [`log_probs`] for a head that is one matrix `weight` [vocabulary, hidden]: one buffer of logits, changed in place into their
/// own gradient.
pub(super) fn log_probs_of_linear(
    weight: &Tensor,
    hidden: &Tensor,
    ids: &Tensor,
    wide: Kind,
    chunk: i64,
) -> Result<Tensor> {
    check(hidden, ids.size().first().copied().unwrap_or(0), "ids")?;
    let wants_gradient = is_recorded(hidden)?;
    let mut values = vec![Tensor::f_zeros([0], (wide, hidden.device()))?];
    let mut gradients = Vec::new();
    {
        let _guard = tch::no_grad_guard();
        let weight = weight.f_detach()?;
        let states = hidden.f_detach()?;
        for (from, len) in chunks(states.size()[0], weight.size()[0], chunk) {
            let ids = ids.f_narrow(0, from, len)?.f_unsqueeze(1)?;
            let mut logits = states.f_narrow(0, from, len)?.f_linear(&weight, None::<&Tensor>)?.f_to_kind(wide)?;
            let total = logits.f_logsumexp([-1].as_slice(), true)?;
            values.push(logits.f_gather(1, &ids, false)?.f_sub(&total)?.f_squeeze_dim(1)?);
            if wants_gradient {
                // d log p(id) / d logits = onehot(id) - softmax
                let mut softmax = logits.f_sub_(&total)?.f_exp_()?.f_neg_()?;
                let ones = Tensor::f_ones_like(&ids)?.f_to_kind(wide)?;
                let towards_logits = softmax.f_scatter_add_(1, &ids, &ones)?;
                gradients.push(towards_logits.f_to_kind(weight.kind())?.f_matmul(&weight)?);
            }
        }
    }
    let values = Tensor::f_cat(&values, 0)?;
    if gradients.is_empty() { Ok(values) } else { carry_gradient(hidden, &values, &Tensor::f_cat(&gradients, 0)?) }
}

/// Cuts `tokens` rows of logits into pieces of at most `chunk` numbers, or one row: where each starts, and its length.
fn chunks(tokens: i64, vocabulary: i64, chunk: i64) -> impl Iterator<Item = (i64, i64)> {
    let len = (chunk / vocabulary.max(1)).max(1);
    (0..tokens).step_by(len as usize).map(move |from| (from, len.min(tokens - from)))
}

fn check(hidden: &Tensor, found: i64, what: &str) -> Result<()> {
    if hidden.dim() != 2 {
        return Err(Error::mismatch("hidden states", "[n, hidden]", format!("{:?}", hidden.size())));
    }
    if hidden.size()[0] != found {
        return Err(Error::mismatch(what, format!("{}, one per hidden state", hidden.size()[0]), found));
    }
    Ok(())
}

/// Applies `value` ([n, hidden] to [n]; row i of the result depends on row i alone) to chunks of tokens, keeping of each
/// chunk the values and the gradient only. Where the head itself is trained, that gradient would miss it: then all tokens
/// go through at once, and the graph keeps their logits.
fn per_token<M: CausalLm + ?Sized>(
    model: &M,
    hidden: &Tensor,
    chunk: i64,
    value: impl Fn(&Tensor, i64, i64) -> Result<Tensor>,
) -> Result<Tensor> {
    let tokens = hidden.size()[0];
    if tokens > 0 && model.logits(&hidden.f_detach()?.f_narrow(0, 0, 1)?)?.requires_grad() {
        return value(hidden, 0, tokens);
    }
    let wants_gradient = is_recorded(hidden)?;
    let mut values = vec![Tensor::f_zeros([0], (model.master_kind(), hidden.device()))?];
    let mut gradients = Vec::new();
    for (from, len) in chunks(tokens, model.vocabulary(), chunk) {
        let rows = hidden.f_detach()?.f_narrow(0, from, len)?;
        if !wants_gradient {
            values.push(value(&rows, from, len)?);
            continue;
        }
        let rows = rows.f_set_requires_grad(true)?;
        let of_chunk = value(&rows, from, len)?;
        gradients.extend(Tensor::f_run_backward(&[of_chunk.f_sum(of_chunk.kind())?], &[&rows], false, false)?);
        values.push(of_chunk.f_detach()?);
    }
    let values = Tensor::f_cat(&values, 0)?;
    if gradients.is_empty() { Ok(values) } else { carry_gradient(hidden, &values, &Tensor::f_cat(&gradients, 0)?) }
}

/// `values` [n] with the derivative `gradients` [n, hidden] towards `hidden` [n, hidden].
fn carry_gradient(hidden: &Tensor, values: &Tensor, gradients: &Tensor) -> Result<Tensor> {
    let kind = values.kind();
    let product = hidden.f_to_kind(kind)?.f_mul(&gradients.f_to_kind(kind)?)?;
    let carrier = product.f_sum_dim_intlist([-1].as_slice(), false, None::<Kind>)?;
    Ok(values.f_add(&carrier.f_sub(&carrier.f_detach()?)?)?)
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
