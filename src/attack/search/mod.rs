//! Gradient-guided search for strings: GCG (Zou et al. 2023), for evaluation and for attacks of training that begin from
//! strings.

mod buffer;
mod candidates;
mod probe;
mod prompt;
mod settings;

use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use self::{buffer::Buffer, prompt::ReadPrompt};
pub use self::{
    probe::{Draft, ProbeSampling},
    prompt::{SearchCost, SearchPrompt},
    settings::{Positions, SearchLoss, TokenSearchSettings},
};
use crate::{CausalLm, Error, Result, tensor};

/// A string of tokens and its loss.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundString {
    /// The tokens.
    pub ids: Vec<i64>,
    /// What the search drives down, the mean over the conversations.
    pub loss: f64,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchStep {
    /// The best of the step's candidates.
    pub found: FoundString,
    /// Candidates whose loss was computed with the model that is attacked.
    pub tried: usize,
    /// Candidates left out because their text is read as other tokens.
    pub unreadable: usize,
}

/// Whether a string of these ids, put in its place in every conversation, is read as these ids again.
pub type ReadsBack<'a> = Box<dyn Fn(&[i64]) -> Result<bool> + 'a>;

/// A search for one string that makes the targets of one or several conversations likely.
pub struct TokenSearch<'a> {
    prompts: Vec<ReadPrompt<'a>>,
    /// 0 for a token that may be used, infinity for one that may not `[vocabulary]`, float32.
    forbidden: Tensor,
    reads_back: ReadsBack<'a>,
    draft: Option<(Box<dyn Draft + 'a>, ProbeSampling)>,
    settings: TokenSearchSettings,
    random: ChaCha8Rng,
    buffer: Buffer,
    best: FoundString,
    cost: SearchCost,
}

impl std::fmt::Debug for TokenSearch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenSearch")
            .field("settings", &self.settings)
            .field("best", &self.best)
            .finish_non_exhaustive()
    }
}

impl<'a> TokenSearch<'a> {
    /// Begins at a string, or at several where the settings have a buffer for them. `allowed` are the ids that may be used,
    /// the string's own need not be among them.
    ///
    /// # Errors
    /// If a setting is out of range; there is no conversation, no string, or strings of different lengths; an id is not of the
    /// model's vocabulary; or the model fails.
    pub fn new(
        model: &'a dyn CausalLm,
        prompts: &[SearchPrompt],
        start: &[Vec<i64>],
        allowed: &[i64],
        settings: TokenSearchSettings,
        random: ChaCha8Rng,
        reads_back: ReadsBack<'a>,
    ) -> Result<Self> {
        settings.validate()?;
        check_strings(start)?;
        if prompts.is_empty() {
            return Err(Error::mismatch("conversations of a token search", "at least one", 0));
        }
        let mut cost = SearchCost::default();
        let read = |prompt| ReadPrompt::new(model, prompt, &mut cost);
        let prompts = prompts.iter().map(read).collect::<Result<Vec<_>>>()?;
        let losses = mean_losses(&prompts, start, &settings, &mut cost)?;
        let strings = start.iter().zip(losses).map(|(ids, loss)| FoundString { ids: ids.clone(), loss });
        let buffer = Buffer::new(strings.collect(), settings.buffer);
        let best = buffer.best().clone();
        let forbidden = forbidden(model, allowed)?;
        Ok(Self { prompts, forbidden, reads_back, draft: None, settings, random, buffer, best, cost })
    }

    /// Lets a cheaper model choose which candidates are worth a pass: see [`ProbeSampling`].
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn with_draft(mut self, draft: impl Draft + 'a, probe: ProbeSampling) -> Result<Self> {
        probe.validate()?;
        self.draft = Some((Box::new(draft), probe));
        Ok(self)
    }

    /// The best string of all so far.
    pub fn best(&self) -> &FoundString {
        &self.best
    }

    /// What was spent so far; of a draft model nothing is counted.
    pub fn cost(&self) -> SearchCost {
        self.cost
    }

    /// One step: gradient, candidates, their losses.
    ///
    /// # Errors
    /// If no candidate's text is read as the tokens that it is made of, a loss is not finite, or the model fails.
    pub fn step(&mut self) -> Result<SearchStep> {
        let promising = self.promising()?;
        let drawn = candidates::draw(&self.buffer.best().ids, &promising, &self.settings, &mut self.random);
        let readable = drawn.iter().map(|ids| (self.reads_back)(ids)).collect::<Result<Vec<_>>>()?;
        let kept: Vec<Vec<i64>> =
            drawn.into_iter().zip(&readable).filter(|(_, kept)| **kept).map(|(ids, _)| ids).collect();
        let unreadable = readable.len() - kept.len();
        if kept.is_empty() {
            return Err(Error::mismatch(
                "candidates of a token search",
                "at least one whose text is read as the same tokens; begin at another string, or raise search.width",
                format!("none of {unreadable}"),
            ));
        }
        let tried = self.judge(&kept)?;
        let found = |(at, loss): (usize, f64)| FoundString { ids: kept[at].clone(), loss };
        let best = tried.iter().copied().min_by(|(_, a), (_, b)| a.total_cmp(b)).map(found);
        let found = best.filter(|best| best.loss.is_finite()).ok_or_else(|| {
            Error::mismatch("losses of a token search's candidates", "finite numbers", "none that is")
        })?;
        self.buffer.add(found.clone());
        if found.loss < self.best.loss {
            self.best = found.clone();
        }
        Ok(SearchStep { found, tried: tried.len(), unreadable })
    }

    /// Whether the model, behind the best string and taking the likeliest tokens, says the target of every conversation.
    ///
    /// # Errors
    /// If the model fails.
    pub fn says_target(&mut self) -> Result<bool> {
        for prompt in &self.prompts {
            if !prompt.says_target(&self.best.ids, &mut self.cost)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// For each conversation the gradient of the loss towards the one-hot rows of the string that the next step goes on from
    /// `[string, vocabulary]`, float32, float64 where the model computes in it.
    ///
    /// # Errors
    /// If the model fails.
    pub fn gradients(&mut self) -> Result<Vec<Tensor>> {
        let Self { prompts, settings, cost, buffer, .. } = self;
        prompts.iter().map(|prompt| prompt.gradient(&buffer.best().ids, settings.loss, cost)).collect()
    }

    /// What the search drives down, of other strings of any lengths: the mean over the conversations.
    ///
    /// # Errors
    /// If a string has no token or one that the model lacks, or the model fails.
    pub fn losses(&mut self, strings: &[Vec<i64>]) -> Result<Vec<f64>> {
        mean_losses(&self.prompts, strings, &self.settings, &mut self.cost)
    }

    /// For each position the allowed tokens along which the loss falls most steeply.
    fn promising(&mut self) -> Result<Vec<Vec<i64>>> {
        let mut sum: Option<Tensor> = None;
        for gradient in self.gradients()? {
            // Conversations have gradients of different sizes; with one of them its size decides nothing.
            let norm = gradient.f_norm_scalaropt_dim(2, [-1].as_slice(), true)?.f_clamp_min(f64::MIN_POSITIVE)?;
            let gradient = gradient.f_div(&norm)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&gradient)?,
                None => gradient,
            });
        }
        let Some(sum) = sum else { return Ok(Vec::new()) };
        let allowed = Vec::<f64>::try_from(self.forbidden.f_eq(0)?.f_sum(Kind::Double)?.f_reshape([1])?)?[0];
        let top_k = (self.settings.top_k as i64).min(allowed as i64);
        let (_, tokens) = sum.f_add(&self.forbidden)?.f_topk(top_k, -1, false, true)?;
        let tokens = tensor::numbers(&tokens)?;
        Ok(tokens.chunks(top_k as usize).map(|line| line.iter().map(|id| *id as i64).collect()).collect())
    }

    /// The losses of the candidates that are tried, and which they are.
    fn judge(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<(usize, f64)>> {
        let Self { prompts, settings, cost, draft, random, .. } = self;
        let mut target = |chosen: &[usize]| {
            let strings: Vec<Vec<i64>> = chosen.iter().map(|at| candidates[*at].clone()).collect();
            mean_losses(prompts, &strings, settings, cost)
        };
        match draft {
            None => {
                let all: Vec<usize> = (0..candidates.len()).collect();
                Ok(all.iter().copied().zip(target(&all)?).collect())
            }
            Some((draft, probe)) => probe.losses(&draft.losses(candidates)?, settings.width, random, &mut target),
        }
    }
}

/// The loss of each string, the mean over the conversations.
fn mean_losses(
    prompts: &[ReadPrompt],
    strings: &[Vec<i64>],
    settings: &TokenSearchSettings,
    cost: &mut SearchCost,
) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; strings.len()];
    for prompt in prompts {
        let losses = prompt.losses(strings, settings.loss, settings.rows, cost)?;
        sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
    }
    Ok(sums.into_iter().map(|sum| sum / prompts.len() as f64).collect())
}

fn check_strings(strings: &[Vec<i64>]) -> Result<()> {
    let lengths: Vec<usize> = strings.iter().map(Vec::len).collect();
    match lengths.first() {
        Some(first) if *first > 0 && lengths.iter().all(|length| length == first) => Ok(()),
        _ => Err(Error::mismatch(
            "strings that a token search begins at",
            "at least one, of one length, at least one token each",
            format!("lengths {lengths:?}"),
        )),
    }
}

fn forbidden(model: &dyn CausalLm, allowed: &[i64]) -> Result<Tensor> {
    let vocabulary = model.vocabulary();
    if let Some(id) = allowed.iter().find(|id| !(0..vocabulary).contains(*id)) {
        return Err(Error::mismatch("allowed token id", format!("0 to {}", vocabulary - 1), id));
    }
    if allowed.is_empty() {
        return Err(Error::mismatch("allowed tokens of a token search", "at least one", "none"));
    }
    let options = (model.master_kind(), model.device());
    let forbidden = Tensor::f_full([vocabulary], f64::INFINITY, options)?;
    Ok(forbidden.f_index_fill(0, &tensor::index(allowed, model.device())?, 0.0)?)
}
