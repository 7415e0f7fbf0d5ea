//! Gradient-guided search for strings: GCG (Zou et al. 2023), for evaluation and for attacks of training that begin from
//! strings.

mod buffer;
mod candidates;
mod probe;
mod prompt;
mod settings;

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use self::{
    buffer::Buffer,
    prompt::{Near, ReadPrompt},
};
pub use self::{
    probe::{Draft, ProbeSampling},
    prompt::{SearchCost, SearchPrompt},
    settings::{Positions, SearchLoss, TokenSearchSettings},
};
use crate::{CausalLm, Error, ErrorKind, Result, tensor};

/// A string of tokens and its loss.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundString {
    /// The tokens.
    pub ids: Vec<i64>,
    /// What the search drives down, the mean over the conversations: by [`SearchLoss`] nats per token of the target, or
    /// their mellowmax.
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
    /// Candidates left out because they were drawn before.
    pub repeated: usize,
}

/// Whether a string of these ids, put in its place in every conversation, is read as these ids again: for conversations of
/// messages [`crate::StringPlace::string_of`] tells, for tokens alone [`crate::Tokenizer::reads_back`]. Asked from several threads.
pub type ReadsBack<'a> = Box<dyn Fn(&[i64]) -> Result<bool> + Sync + 'a>;

/// A search for one string that makes the targets of one or several conversations likely.
pub struct TokenSearch<'a> {
    prompts: Vec<ReadPrompt<'a>>,
    /// 0 for a token that may be used, infinity for one that may not `[vocabulary]`, in the model's master kind.
    forbidden: Tensor,
    /// How many tokens may be used.
    allowed: usize,
    reads_back: ReadsBack<'a>,
    draft: Option<(Box<dyn Draft + 'a>, ProbeSampling)>,
    settings: TokenSearchSettings,
    /// Strings of one forward pass.
    rows: usize,
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
    /// Begins at a string, or at as many as the settings' buffer holds. `allowed` are the ids that may be used, the string's own
    /// need not be among them.
    ///
    /// # Errors
    /// If a setting is out of range; there is no conversation, no string, more than the buffer holds, or strings of different
    /// lengths; an id is not of the model's vocabulary; a loss is not finite; or the model fails.
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
        check_strings(start, settings.buffer)?;
        check_ids("strings that a token search begins at", start.concat(), model)?;
        check_ids("allowed tokens of a token search", allowed.to_vec(), model)?;
        check_prompts(prompts, model)?;
        let mut cost = SearchCost::default();
        let mut rows = settings.rows;
        let read = |prompt| ReadPrompt::new(model, prompt, &mut cost);
        let prompts = prompts.iter().map(read).collect::<Result<Vec<_>>>()?;
        let near = Near { strings: start, like: &[] };
        let losses = mean_losses(&prompts, near, &settings, &mut rows, &mut cost)?;
        if let Some(loss) = losses.iter().find(|loss| !loss.is_finite()) {
            let what = "loss of a string that a token search begins at".into();
            return Err(ErrorKind::NotFinite { what, value: *loss }.into());
        }
        let strings = start.iter().zip(losses).map(|(ids, loss)| FoundString { ids: ids.clone(), loss });
        let buffer = Buffer::new(strings.collect(), settings.buffer);
        let best = buffer.best().clone();
        let distinct = allowed.iter().collect::<HashSet<_>>().len();
        Ok(Self {
            prompts,
            forbidden: forbidden(model, allowed)?,
            allowed: distinct,
            reads_back,
            draft: None,
            settings,
            rows,
            random,
            buffer,
            best,
            cost,
        })
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
    /// If the gradient is not finite, no candidate's text is read as the tokens that it is made of, no candidate's loss is
    /// finite, or the model fails.
    pub fn step(&mut self) -> Result<SearchStep> {
        let promising = self.promising()?;
        let drawn = candidates::draw(&self.buffer.best().ids, &promising, &self.settings, &mut self.random);
        let mut seen = HashSet::new();
        let distinct: Vec<Vec<i64>> = drawn.into_iter().filter(|ids| seen.insert(ids.clone())).collect();
        let repeated = self.settings.width - distinct.len();
        let readable = in_parallel(&distinct, &self.reads_back)?;
        let (kept, left_out): (Vec<_>, Vec<_>) = distinct.into_iter().zip(readable).partition(|(_, kept)| *kept);
        let kept: Vec<Vec<i64>> = kept.into_iter().map(|(ids, _)| ids).collect();
        let unreadable = left_out.len();
        if kept.is_empty() {
            return Err(Error::mismatch(
                "candidates of a token search",
                "at least one whose text is read as the same tokens; begin at another string, or raise search.width",
                format!("none of {unreadable}"),
            ));
        }
        let tried = self.judge(&kept)?;
        let finite = tried.iter().copied().filter(|(_, loss)| loss.is_finite());
        let best = finite.min_by(|(_, a), (_, b)| a.total_cmp(b));
        let (at, loss) = best.ok_or_else(|| {
            Error::mismatch("losses of a token search's candidates", "finite numbers", "none that is")
        })?;
        let found = FoundString { ids: kept[at].clone(), loss };
        self.buffer.add(found.clone());
        if found.loss < self.best.loss {
            self.best = found.clone();
        }
        Ok(SearchStep { found, tried: tried.len(), unreadable, repeated })
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

    /// What the search drives down, of other strings: the mean over the conversations.
    ///
    /// # Errors
    /// If strings are of different lengths, or have no token or one that the model lacks, or the model fails.
    pub fn losses(&mut self, strings: &[Vec<i64>]) -> Result<Vec<f64>> {
        check_strings(strings, strings.len())?;
        let Some(first) = self.prompts.first() else { return Ok(Vec::new()) };
        check_ids("strings of a token search", strings.concat(), first.model())?;
        let Self { prompts, settings, rows, cost, buffer, .. } = self;
        mean_losses(prompts, Near { strings, like: &buffer.best().ids }, settings, rows, cost)
    }

    /// For each position the allowed tokens along which the loss falls most steeply.
    fn promising(&mut self) -> Result<Vec<Vec<i64>>> {
        let mut sum = self.forbidden.f_unsqueeze(0)?;
        for gradient in self.gradients()? {
            let most = tensor::number(&gradient.f_abs()?.f_max()?)?;
            if !most.is_finite() {
                return Err(ErrorKind::NotFinite { what: "gradient of a token search".into(), value: most }.into());
            }
            // Conversations have gradients of different sizes; with one of them its size decides nothing.
            let norm =
                gradient.f_norm_scalaropt_dim(2, [-1].as_slice(), true)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
            sum = sum.f_add(&gradient.f_div(&norm)?)?;
        }
        let top_k = self.settings.top_k.min(self.allowed);
        let (_, tokens) = sum.f_topk(top_k as i64, -1, false, true)?;
        let tokens = tensor::numbers(&tokens)?;
        Ok(tokens.chunks(top_k).map(|line| line.iter().map(|id| *id as i64).collect()).collect())
    }

    /// The losses of the candidates that are tried, and which they are.
    fn judge(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<(usize, f64)>> {
        let Self { prompts, settings, rows, cost, draft, random, buffer, .. } = self;
        let like = &buffer.best().ids;
        let mut target = |chosen: &[usize]| {
            let strings: Vec<Vec<i64>> = chosen.iter().map(|at| candidates[*at].clone()).collect();
            mean_losses(prompts, Near { strings: &strings, like }, settings, rows, cost)
        };
        match draft {
            None => {
                let all: Vec<usize> = (0..candidates.len()).collect();
                Ok(all.iter().copied().zip(target(&all)?).collect())
            }
            Some((draft, probe)) => {
                let losses = draft.losses(candidates)?;
                if losses.len() != candidates.len() {
                    return Err(Error::mismatch("losses of a draft", candidates.len(), losses.len()));
                }
                probe.losses(&losses, random, &mut target)
            }
        }
    }
}

/// The loss of each string, the mean over the conversations.
fn mean_losses(
    prompts: &[ReadPrompt],
    near: Near,
    settings: &TokenSearchSettings,
    rows: &mut usize,
    cost: &mut SearchCost,
) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; near.strings.len()];
    for prompt in prompts {
        let losses = prompt.losses(near, settings.loss, rows, cost)?;
        sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
    }
    Ok(sums.into_iter().map(|sum| sum / prompts.len() as f64).collect())
}

/// What a check says of each string, in their order; asked from as many threads as the machine runs.
fn in_parallel(strings: &[Vec<i64>], check: &ReadsBack) -> Result<Vec<bool>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = strings.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let ask = |strings: &[Vec<i64>]| strings.iter().map(|ids| check(ids)).collect::<Result<Vec<_>>>();
        let asked: Vec<_> = strings.chunks(share).map(|strings| scope.spawn(move || ask(strings))).collect();
        let panicked = || Error::mismatch("check of a token search's candidates", "an answer", "a panic");
        let found = asked.into_iter().map(|thread| thread.join().map_err(|_| panicked())?);
        Ok(found.collect::<Result<Vec<_>>>()?.concat())
    })
}

fn check_strings(strings: &[Vec<i64>], most: usize) -> Result<()> {
    let lengths: Vec<usize> = strings.iter().map(Vec::len).collect();
    let even = lengths.first().is_some_and(|first| *first > 0 && lengths.iter().all(|length| length == first));
    if !even || strings.len() > most.max(1) {
        return Err(Error::mismatch(
            "strings of a token search",
            format!("1 to {}, of one length, of at least one token each", most.max(1)),
            format!("lengths {lengths:?}"),
        ));
    }
    Ok(())
}

fn check_ids(what: &str, ids: Vec<i64>, model: &dyn CausalLm) -> Result<()> {
    let vocabulary = model.vocabulary();
    match ids.iter().find(|id| !(0..vocabulary).contains(*id)) {
        Some(id) => Err(Error::mismatch(what, format!("ids from 0 to {}", vocabulary - 1), id)),
        None if ids.is_empty() => Err(Error::mismatch(what, "at least one token", "none")),
        None => Ok(()),
    }
}

fn check_prompts(prompts: &[SearchPrompt], model: &dyn CausalLm) -> Result<()> {
    if prompts.is_empty() {
        return Err(Error::mismatch("conversations of a token search", "at least one", 0));
    }
    for prompt in prompts {
        check_ids("target of a token search", prompt.target.clone(), model)?;
        if !prompt.behind.is_empty() {
            check_ids("tokens behind the string of a token search", prompt.behind.clone(), model)?;
        }
    }
    Ok(())
}

fn forbidden(model: &dyn CausalLm, allowed: &[i64]) -> Result<Tensor> {
    let options = (model.master_kind(), model.device());
    let forbidden = Tensor::f_full([model.vocabulary()], f64::INFINITY, options)?;
    Ok(forbidden.f_index_fill(0, &tensor::index(allowed, model.device())?, 0.0)?)
}
