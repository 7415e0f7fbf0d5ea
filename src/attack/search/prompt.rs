//! The loss of strings in one conversation, and its gradient.

use tch::{Kind, Tensor};

use super::settings::SearchLoss;
use crate::{
    Batch, CausalLm, Continuation, ContinuationKind, Example, Input, Last, Pass, Result, TokenKind, Tokens, tensor,
};

/// A conversation that a searched string stands in, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchPrompt {
    /// What comes before the string: read once.
    pub before: Vec<i64>,
    /// What comes between the string and the answer.
    pub behind: Vec<i64>,
    /// How the answer is to begin; at least one token.
    pub target: Vec<i64>,
}

/// What a search has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SearchCost {
    /// Strings whose loss was computed, once for every conversation.
    pub forward_passes: usize,
    /// Strings whose gradient was computed.
    pub backward_passes: usize,
    /// Tokens that the model read for that; those of a text that was read once count once.
    pub tokens: usize,
}

impl SearchCost {
    /// Adds what another search has cost.
    pub fn add(&mut self, other: &Self) {
        self.forward_passes += other.forward_passes;
        self.backward_passes += other.backward_passes;
        self.tokens += other.tokens;
    }
}

/// A conversation whose first part the model has read.
pub(super) struct ReadPrompt<'a> {
    model: Box<dyn CausalLm + 'a>,
    prompt: SearchPrompt,
}

/// Strings of one length, and a string that they differ from in few tokens.
#[derive(Clone, Copy)]
pub(super) struct Near<'s> {
    pub(super) strings: &'s [Vec<i64>],
    /// What most of them begin like; it may be empty.
    pub(super) like: &'s [i64],
}

impl Near<'_> {
    /// How many tokens each string begins with in common with `like`; its last token is its own.
    fn common(&self) -> Vec<usize> {
        let same = |string: &Vec<i64>| string.iter().zip(self.like).take_while(|(a, b)| a == b).count();
        self.strings.iter().map(|string| same(string).min(string.len() - 1)).collect()
    }
}

impl<'a> ReadPrompt<'a> {
    pub(super) fn new(model: &'a dyn CausalLm, prompt: &SearchPrompt, cost: &mut SearchCost) -> Result<Self> {
        cost.tokens += prompt.before.len();
        Ok(Self { model: model.behind(&prompt.before)?, prompt: prompt.clone() })
    }

    pub(super) fn model(&self) -> &(dyn CausalLm + 'a) {
        &*self.model
    }

    /// Rows of what is left of the strings, what is behind them, and the target.
    fn batch<'s>(&self, strings: impl Iterator<Item = &'s [i64]>, cost: &mut SearchCost) -> Result<Batch> {
        let example = |string: &[i64]| {
            let mut prompt = Tokens::of_kind(string.to_vec(), TokenKind::User);
            prompt.extend(&Tokens::of_kind(self.prompt.behind.clone(), TokenKind::Template));
            let tokens = Tokens::of_kind(self.prompt.target.clone(), TokenKind::Target);
            let target = Continuation { kind: ContinuationKind::Harmful, tokens };
            Example::new("searched string", prompt, vec![target])
        };
        let batch = Batch::new(strings.map(example).collect::<Result<_>>()?, self.model.device())?;
        cost.forward_passes += batch.rows();
        cost.tokens += batch.layout().tokens();
        Ok(batch)
    }

    /// The loss of each string `[strings]`, at most `rows` at a time; `rows` is halved where memory runs out.
    ///
    /// What strings begin with in common is read once.
    pub(super) fn losses(
        &self,
        near: Near,
        loss: SearchLoss,
        rows: &mut usize,
        cost: &mut SearchCost,
    ) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let common = near.common();
        let shared = common.iter().any(|common| *common > 0).then(|| self.model.behind(near.like)).transpose()?;
        cost.tokens += shared.as_ref().map_or(0, |_| near.like.len());
        let model = shared.as_deref().unwrap_or(&*self.model);
        // Rows of like length together, so that little is padding.
        let mut order: Vec<usize> = (0..common.len()).collect();
        order.sort_by_key(|at| common[*at]);
        let mut losses = vec![0.0; common.len()];
        let mut left = &order[..];
        while !left.is_empty() {
            let (chunk, rest) = left.split_at(left.len().min(*rows));
            let mut of_chunk = SearchCost::default();
            match self.losses_of_chunk(model, near.strings, &common, chunk, loss, &mut of_chunk) {
                Err(error) if chunk.len() > 1 && error.is_out_of_memory() => {
                    *rows = chunk.len() / 2;
                    tracing::info!(rows = *rows, "memory ran out: a token search computes fewer candidates at a time");
                }
                found => {
                    chunk.iter().zip(found?).for_each(|(at, loss)| losses[*at] = loss);
                    cost.add(&of_chunk);
                    left = rest;
                }
            }
        }
        Ok(losses)
    }

    /// The losses of the strings that `chunk` names, of which `common` tokens have been read.
    fn losses_of_chunk(
        &self,
        model: &dyn CausalLm,
        strings: &[Vec<i64>],
        common: &[usize],
        chunk: &[usize],
        loss: SearchLoss,
        cost: &mut SearchCost,
    ) -> Result<Vec<f64>> {
        let batch = self.batch(chunk.iter().map(|at| &strings[*at][common[*at]..]), cost)?;
        let read = chunk.iter().map(|at| self.prompt.before.len() + common[*at]).collect();
        let embeddings = model.embed(batch.ids())?;
        tensor::numbers(&self.loss(model, &batch, embeddings, read, loss)?)
    }

    /// The gradient of a string's loss towards the one-hot rows of its tokens `[string, vocabulary]`, in the model's
    /// [`CausalLm::master_kind`].
    pub(super) fn gradient(&self, string: &[i64], loss: SearchLoss, cost: &mut SearchCost) -> Result<Tensor> {
        cost.backward_passes += 1;
        let model = &*self.model;
        let batch = self.batch(std::iter::once(string), cost)?;
        let embeddings = model.embed(batch.ids())?.f_detach()?.f_set_requires_grad(true)?;
        let read = vec![self.prompt.before.len()];
        let loss = self.loss(model, &batch, embeddings.shallow_clone(), read, loss)?.f_sum(None::<Kind>)?;
        let gradients = Tensor::f_run_backward(&[loss], &[&embeddings], false, false)?;
        let own = gradients[0].f_narrow(0, 0, string.len() as i64)?;
        let _guard = tch::no_grad_guard();
        one_hot(&own, model.embedding())
    }

    /// `[strings]`, from the un-scaled embeddings `[tokens, hidden]` of a batch of strings, each behind so many tokens.
    fn loss(
        &self,
        model: &dyn CausalLm,
        batch: &Batch,
        embeddings: Tensor,
        read: Vec<usize>,
        loss: SearchLoss,
    ) -> Result<Tensor> {
        let pass = Pass { last: Last::Predictors, ..Pass::default() };
        let hidden = model.hidden(&Input::of_embeddings(embeddings, batch.layout(), pass)?.behind(read)?)?;
        let targets = batch.targets(ContinuationKind::Harmful)?;
        let losses = model.log_probs(&hidden.predicting(&targets)?, &targets.ids)?.f_neg()?;
        // [strings, target]
        let losses = losses.f_view([batch.rows() as i64, self.prompt.target.len() as i64])?;
        match loss {
            SearchLoss::CrossEntropy => Ok(losses.f_mean_dim([-1].as_slice(), false, None::<Kind>)?),
            SearchLoss::Mellowmax { sharpness } => {
                let sum = losses.f_mul_scalar(sharpness)?.f_logsumexp([-1].as_slice(), false)?;
                let mean = sum.f_sub_scalar((self.prompt.target.len() as f64).ln())?;
                Ok(mean.f_div_scalar(sharpness)?)
            }
        }
    }

    /// Whether the likeliest tokens behind a string are the target.
    pub(super) fn says_target(&self, string: &[i64], cost: &mut SearchCost) -> Result<bool> {
        let _guard = tch::no_grad_guard();
        let batch = self.batch(std::iter::once(string), cost)?;
        let pass = Pass { last: Last::Predictors, ..Pass::default() };
        let hidden = self.model.hidden(&Input::of_batch(&*self.model, &batch, None, pass)?)?;
        let targets = batch.targets(ContinuationKind::Harmful)?;
        let likeliest = self.model.logits(&hidden.predicting(&targets)?)?.f_argmax(-1, false)?;
        Ok(likeliest.f_equal(&targets.ids)?)
    }
}

/// So many rows of an embedding table are converted at a time.
const ROWS_OF_TABLE: i64 = 1 << 14;

/// From gradients towards embeddings `[string, hidden]` those towards one-hot rows `[string, vocabulary]`. A table in half
/// precision is never whole in the gradients' dtype.
fn one_hot(gradients: &Tensor, table: &Tensor) -> Result<Tensor> {
    let part = |rows: Tensor| -> Result<Tensor> { Ok(gradients.f_matmul(&rows.f_to_kind(gradients.kind())?.f_tr()?)?) };
    let parts = table.f_detach()?.f_split(ROWS_OF_TABLE, 0)?.into_iter().map(part).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&parts, -1)?)
}
