//! The loss of strings in one conversation, and its gradient.

use tch::{Kind, Tensor};

use super::settings::SearchLoss;
use crate::{
    Batch, CausalLm, Continuation, ContinuationKind, Example, Input, Last, Layout, Pass, Result, TokenKind, Tokens,
    tensor,
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

impl<'a> ReadPrompt<'a> {
    pub(super) fn new(model: &'a dyn CausalLm, prompt: &SearchPrompt, cost: &mut SearchCost) -> Result<Self> {
        cost.tokens += prompt.before.len();
        Ok(Self { model: model.behind(&prompt.before)?, prompt: prompt.clone() })
    }

    fn batch(&self, strings: &[Vec<i64>], cost: &mut SearchCost) -> Result<Batch> {
        let example = |string: &Vec<i64>| {
            let mut prompt = Tokens::of_kind(string.clone(), TokenKind::User);
            prompt.extend(&Tokens::of_kind(self.prompt.behind.clone(), TokenKind::Template));
            let tokens = Tokens::of_kind(self.prompt.target.clone(), TokenKind::Target);
            let target = Continuation { kind: ContinuationKind::Harmful, tokens };
            Example::new("searched string", prompt, vec![target])
        };
        let batch = Batch::new(strings.iter().map(example).collect::<Result<_>>()?, self.model.device())?;
        cost.forward_passes += strings.len();
        cost.tokens += batch.layout().tokens();
        Ok(batch)
    }

    /// The loss of each string `[strings]`, at most `rows` at a time.
    pub(super) fn losses(
        &self,
        strings: &[Vec<i64>],
        loss: SearchLoss,
        rows: usize,
        cost: &mut SearchCost,
    ) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let mut losses = Vec::with_capacity(strings.len());
        for strings in strings.chunks(rows) {
            let batch = self.batch(strings, cost)?;
            let embeddings = self.model.embed(batch.ids())?;
            losses.extend(tensor::numbers(&self.loss(&batch, embeddings, loss)?)?);
        }
        Ok(losses)
    }

    /// The gradient of a string's loss towards the one-hot rows of its tokens `[string, vocabulary]`, in the model's
    /// [`CausalLm::master_kind`].
    pub(super) fn gradient(&self, string: &[i64], loss: SearchLoss, cost: &mut SearchCost) -> Result<Tensor> {
        cost.backward_passes += 1;
        let batch = self.batch(&[string.to_vec()], cost)?;
        let embeddings = self.model.embed(batch.ids())?.f_detach()?.f_set_requires_grad(true)?;
        let loss = self.loss(&batch, embeddings.shallow_clone(), loss)?.f_sum(None::<Kind>)?;
        let gradients = Tensor::f_run_backward(&[loss], &[&embeddings], false, false)?;
        let own = gradients[0].f_narrow(0, 0, string.len() as i64)?;
        let _guard = tch::no_grad_guard();
        Ok(own.f_matmul(&self.model.embedding().f_detach()?.f_to_kind(own.kind())?.f_tr()?)?)
    }

    /// `[strings]`, from the un-scaled embeddings `[tokens, hidden]` of a batch of strings.
    fn loss(&self, batch: &Batch, embeddings: Tensor, loss: SearchLoss) -> Result<Tensor> {
        let model = &*self.model;
        let layout: &Layout = batch.layout();
        let pass = Pass { last: Last::Predictors, ..Pass::default() };
        let hidden = model.hidden(&Input::of_embeddings(embeddings, layout, pass)?)?;
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
        let batch = self.batch(&[string.to_vec()], cost)?;
        let pass = Pass { last: Last::Predictors, ..Pass::default() };
        let hidden = self.model.hidden(&Input::of_batch(&*self.model, &batch, None, pass)?)?;
        let targets = batch.targets(ContinuationKind::Harmful)?;
        let likeliest = self.model.logits(&hidden.predicting(&targets)?)?.f_argmax(-1, false)?;
        Ok(likeliest.f_equal(&targets.ids)?)
    }
}
