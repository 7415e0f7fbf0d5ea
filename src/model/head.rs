//! Next-token probabilities without the vocabulary's logits ever being whole.
//!
//! Everything about one id comes from its log-odds against all others, log(p / (1 - p)): log p is its log-sigmoid, log(1 - p)
//! that of its negative, and neither loses digits where p is close to 1.
//!
//! libtorch's Rust binding has no autograd function of one's own. The same effect comes from one product: the value `v` of
//! a chunk and its gradient `g` towards the hidden state are computed at once, and what is returned is
//! `v + sum(hidden * g) - sum(hidden * g).detach()`, whose value is `v` and whose derivative is `g`. That works because the
//! value of a token depends on that token's hidden state alone, and it lets the chunk's logits go at once.

use tch::{Device, Kind, Tensor};

use super::{causal_lm::CausalLm, product};
use crate::{Error, Result, tensor::is_recorded};

/// Logits of so many numbers exist at a time where tokens are cut into chunks: 64 MiB in float32.
pub(super) const CHUNK: i64 = 1 << 24;

/// The same where the vocabulary is: on a CPU what stays in its cache, 2 MiB.
pub(super) fn vocabulary_chunk(device: Device) -> i64 {
    if device.is_cuda() { CHUNK } else { 1 << 19 }
}

/// `chunk` is [`CHUNK`], but for tests.
pub(super) fn log_odds<M: CausalLm + ?Sized>(model: &M, hidden: &Tensor, ids: &Tensor, chunk: i64) -> Result<Tensor> {
    check(hidden, ids.size().first().copied().unwrap_or(0), "ids")?;
    per_token(model, hidden, chunk, |rows, from, len| {
        let logits = model.logits(rows)?.f_to_kind(model.master_kind())?;
        let ids = ids.f_narrow(0, from, len)?.f_unsqueeze(1)?;
        let others = logits.f_scatter_value(1, &ids, f64::NEG_INFINITY)?.f_logsumexp([-1].as_slice(), false)?;
        Ok(logits.f_gather(1, &ids, false)?.f_squeeze_dim(1)?.f_sub(&others)?)
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

/// [`log_odds`] for a head that is one matrix `weight` [vocabulary, hidden]. It is read once, a part of the vocabulary at a
/// time: the sum over the other ids of exp(logit), and their mean row of the head under those weights, grow from part to part,
/// shrunk whenever a higher logit is met. `chunk` is [`vocabulary_chunk`], but for tests.
pub(super) fn log_odds_of_linear(
    weight: &Tensor,
    hidden: &Tensor,
    ids: &Tensor,
    wide: Kind,
    chunk: i64,
) -> Result<Tensor> {
    check(hidden, ids.size().first().copied().unwrap_or(0), "ids")?;
    let wants_gradient = is_recorded(hidden)?;
    let guard = tch::no_grad_guard();
    let (weight, states) = (weight.f_detach()?, hidden.f_detach()?);
    let [vocabulary, width] = [0, 1].map(|dim| weight.size()[dim]);
    let tokens = states.size()[0];
    let options = (wide, states.device());
    let mut target = Tensor::f_zeros([tokens, 1], options)?;
    // Lower than any logit, and finite, so that differences are.
    let mut highest = Tensor::f_full([tokens, 1], f64::from(f32::MIN), options)?;
    let mut sum = Tensor::f_zeros([tokens, 1], options)?;
    let mut mean = Tensor::f_zeros([tokens, width], options)?;
    for (from, len) in chunks(vocabulary, tokens, chunk) {
        let part = weight.f_narrow(0, from, len)?;
        let mut logits = product::linear(&states, &part, None)?.f_to_kind(wide)?;
        let place = ids.f_unsqueeze(1)?.f_sub_scalar(from)?;
        let here = place.f_ge(0)?.f_logical_and(&place.f_lt(len)?)?;
        let place = place.f_clamp(0, len - 1)?;
        let found = logits.f_gather(1, &place, false)?;
        target = found.f_where_self(&here, &target)?;
        // The id itself is none of the others.
        let _ = logits.f_scatter_(1, &place, &found.f_masked_fill(&here, f64::NEG_INFINITY)?)?;
        let above = logits.f_amax([1].as_slice(), true)?.f_maximum(&highest)?;
        let shrink = highest.f_sub(&above)?.f_exp()?;
        let others = logits.f_sub_(&above)?.f_exp_()?;
        sum = sum.f_mul(&shrink)?.f_add(&others.f_sum_dim_intlist([1].as_slice(), true, None::<Kind>)?)?;
        if wants_gradient {
            mean = mean.f_mul(&shrink)?.f_add(&product::transposed(&others.f_to_kind(weight.kind())?, &part)?)?;
        }
        highest = above;
    }
    let values = target.f_sub(&highest)?.f_sub(&sum.f_log()?)?.f_squeeze_dim(1)?;
    if !wants_gradient {
        return Ok(values);
    }
    // d log-odds / d hidden: the id's row of the head less the mean row of the others.
    let own = weight.f_index_select(0, ids)?;
    let gradients = own.f_to_kind(wide)?.f_sub(&mean.f_div(&sum)?)?;
    drop(guard);
    carry_gradient(hidden, &values, &gradients)
}

/// Cuts `rows` rows of `width` numbers into pieces of at most `chunk` numbers, or one row: where each starts, and its length.
fn chunks(rows: i64, width: i64, chunk: i64) -> impl Iterator<Item = (i64, i64)> {
    let len = (chunk / width.max(1)).max(1);
    (0..rows).step_by(len as usize).map(move |from| (from, len.min(rows - from)))
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
