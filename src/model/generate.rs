//! Continuing prompts token by token.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    cache::KvCache,
    causal_lm::{CausalLm, Input, Pass},
    decoder::Decoder,
    perturbation::Perturbation,
};
use crate::{Batch, Error, ErrorKind, Example, Layout, Result, TokenKind, Tokens, digest::generator, tensor};

/// How prompts are continued.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `max_new_tokens` | 128 | stop after so many tokens | at least 1 |
/// | `end_ids` | none | stop behind any of these, which is part of the result | ids of the vocabulary |
/// | `sampling` | none | draw tokens; without, the likeliest is taken | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generation {
    /// Stop after so many tokens.
    pub max_new_tokens: usize,
    /// Stop behind any of these ids.
    pub end_ids: Vec<i64>,
    /// Draw tokens instead of taking the likeliest.
    pub sampling: Option<Sampling>,
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Logits are divided by this; above 0.
    pub temperature: f64,
    /// Only the likeliest tokens whose probabilities add up to this are drawn; in (0, 1]. With `top_k`, the probabilities
    /// are those among the tokens that it leaves.
    pub top_p: f64,
    /// Only so many of the likeliest tokens are drawn; 0: all.
    pub top_k: usize,
    /// The draws of a row come from this seed and the row's example id, whatever else is in the batch.
    pub seed: u64,
}

impl Default for Generation {
    fn default() -> Self {
        Self { max_new_tokens: 128, end_ids: Vec::new(), sampling: None }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 0 }
    }
}

impl Generation {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        Error::check_count("generation.max_new_tokens", self.max_new_tokens)?;
        if let Some(id) = self.end_ids.iter().find(|id| **id < 0) {
            return Err(Error::setting("generation.end_ids", id, "at least 0"));
        }
        let Some(sampling) = &self.sampling else { return Ok(()) };
        Error::check_positive("generation.sampling.temperature", sampling.temperature)?;
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return Err(Error::setting("generation.sampling.top_p", sampling.top_p, "above 0 and at most 1"));
        }
        Ok(())
    }
}

/// The rows of one call: what each has said, and which still go on.
struct Rows<'a> {
    settings: &'a Generation,
    prompts: &'a Batch,
    said: Vec<Vec<i64>>,
    active: Vec<usize>,
    random: Vec<ChaCha8Rng>,
}

impl<'a> Rows<'a> {
    fn new(prompts: &'a Batch, vocabulary: i64, settings: &'a Generation) -> Result<Self> {
        settings.validate()?;
        if let Some(id) = settings.end_ids.iter().find(|id| **id >= vocabulary) {
            return Err(Error::setting(
                "generation.end_ids",
                id,
                format!("below the model's vocabulary, {vocabulary}"),
            ));
        }
        if let Some(example) = prompts.examples().iter().find(|example| !example.continuations().is_empty()) {
            return Err(Error::example(example.id(), "has a continuation; only prompts can be continued"));
        }
        let seed = settings.sampling.as_ref().map_or(0, |sampling| sampling.seed);
        Ok(Self {
            settings,
            prompts,
            said: vec![Vec::new(); prompts.rows()],
            active: (0..prompts.rows()).collect(),
            random: prompts.examples().iter().map(|example| generator(seed, "sampling", example.id())).collect(),
        })
    }

    /// Takes one more token for every active row from its logits `[active, vocabulary]`; gives the places, in the list of
    /// active rows, of those that go on.
    fn take(&mut self, logits: &Tensor) -> Result<Vec<usize>> {
        self.check_finite(logits)?;
        let chosen = match &self.settings.sampling {
            None => Vec::<i64>::try_from(logits.f_argmax(-1, false)?.f_to_device(tch::Device::Cpu)?)?,
            Some(sampling) => self.draw(logits, sampling)?,
        };
        for (row, id) in self.active.iter().zip(&chosen) {
            self.said[*row].push(*id);
        }
        let goes_on = |at: &usize| {
            !self.settings.end_ids.contains(&chosen[*at])
                && self.said[self.active[*at]].len() < self.settings.max_new_tokens
        };
        let kept: Vec<usize> = (0..chosen.len()).filter(goes_on).collect();
        self.active = kept.iter().map(|at| self.active[*at]).collect();
        Ok(kept)
    }

    /// What a model says whose numbers overflowed would pass for an answer.
    fn check_finite(&self, logits: &Tensor) -> Result<()> {
        let largest = tensor::numbers(&logits.f_amax([-1].as_slice(), false)?)?;
        match self.active.iter().zip(&largest).find(|(_, largest)| !largest.is_finite()) {
            Some((row, value)) => {
                let what = format!("largest logit behind the prompt of example {}", self.prompts.examples()[*row].id());
                Err(ErrorKind::NotFinite { what, value: *value }.into())
            }
            None => Ok(()),
        }
    }

    fn draw(&mut self, logits: &Tensor, sampling: &Sampling) -> Result<Vec<i64>> {
        let scaled = logits.f_to_kind(Kind::Double)?.f_div_scalar(sampling.temperature)?;
        let (sorted, ids) = scaled.f_softmax(-1, Kind::Double)?.f_sort(-1, true)?;
        let vocabulary = sorted.size()[1] as usize;
        let (sorted, ids) = (tensor::numbers(&sorted)?, tensor::numbers(&ids)?);
        let lines = sorted.chunks(vocabulary).zip(ids.chunks(vocabulary));
        let draws = self.active.iter().zip(lines).map(|(row, (probabilities, ids))| {
            let at = draw_sorted(probabilities, sampling, self.random[*row].random::<f64>());
            ids[at] as i64
        });
        Ok(draws.collect())
    }
}

/// The place drawn by `uniform` in [0, 1) among probabilities sorted downwards.
fn draw_sorted(probabilities: &[f64], sampling: &Sampling, uniform: f64) -> usize {
    let most = if sampling.top_k == 0 { probabilities.len() } else { sampling.top_k.min(probabilities.len()) };
    let enough = sampling.top_p * probabilities[..most].iter().sum::<f64>();
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < most && (kept == 0 || mass < enough) {
        mass += probabilities[kept];
        kept += 1;
    }
    let mut left = uniform * mass;
    for (at, probability) in probabilities[..kept].iter().enumerate() {
        left -= probability;
        if left < 0.0 {
            return at;
        }
    }
    kept - 1
}

/// The logits of the last token of every row `[rows, vocabulary]`.
fn last_logits<M: CausalLm + ?Sized>(model: &M, last: &Tensor, layout: &Layout) -> Result<Tensor> {
    let ends: Vec<i64> = layout.rows().iter().map(|row| row.tokens().end as i64 - 1).collect();
    model.logits(&last.f_index_select(0, &tensor::index(&ends, last.device())?)?)
}

/// For a model without a cache: reads the whole text anew for every token.
pub(super) fn without_cache<M: CausalLm + ?Sized>(
    model: &M,
    prompts: &Batch,
    perturbation: Option<&Perturbation>,
    settings: &Generation,
) -> Result<Vec<Vec<i64>>> {
    let _guard = tch::no_grad_guard();
    let mut rows = Rows::new(prompts, model.vocabulary(), settings)?;
    while !rows.active.is_empty() {
        let texts = prompts.examples().iter().zip(&rows.said).map(|(example, said)| longer(example, said));
        let texts = Batch::new(texts.collect::<Result<_>>()?, prompts.device())?;
        let hidden = model.hidden(&Input::of_batch(model, &texts, perturbation, Pass::default())?)?;
        let active: Vec<i64> = rows.active.iter().map(|row| *row as i64).collect();
        let logits = last_logits(model, &hidden.last, texts.layout())?;
        rows.take(&logits.f_index_select(0, &tensor::index(&active, logits.device())?)?)?;
    }
    Ok(rows.said)
}

fn longer(example: &Example, said: &[i64]) -> Result<Example> {
    let mut prompt = example.prompt().clone();
    prompt.extend(&Tokens::of_kind(said.to_vec(), TokenKind::Template));
    example.with_prompt(prompt)
}

/// For the decoder: reads the prompts once, then one token per row and step.
///
/// Where the rotary factors switch with the length of the text (LongRoPE), what the cache holds of a shorter text is wrong
/// for a longer one: when a row crosses the switch, all are read anew. transformers means to do the same for Phi-3.
pub(super) fn with_cache(
    model: &Decoder,
    prompts: &Batch,
    perturbation: Option<&Perturbation>,
    settings: &Generation,
) -> Result<Vec<Vec<i64>>> {
    let _guard = tch::no_grad_guard();
    let mut rows = Rows::new(prompts, model.vocabulary(), settings)?;
    let read = |texts: &Batch, perturbation: Option<&Perturbation>| -> Result<(KvCache, Tensor)> {
        let mut cache = model.new_cache(texts.rows())?;
        let hidden = model.hidden_cached(&Input::of_batch(model, texts, perturbation, Pass::default())?, &mut cache)?;
        Ok((cache, last_logits(model, &hidden.last, texts.layout())?))
    };
    let (mut cache, mut logits) = read(prompts, perturbation)?;
    loop {
        let before = rows.active.len();
        let kept = rows.take(&logits)?;
        if kept.is_empty() {
            return Ok(rows.said);
        }
        if kept.len() < before {
            cache.keep(&kept)?;
        }
        if model.switches_after(cache.lengths()) {
            let texts = rows.active.iter().map(|row| longer(&prompts.examples()[*row], &rows.said[*row]));
            let texts = Batch::new(texts.collect::<Result<_>>()?, prompts.device())?;
            let perturbation = perturbation.map(|found| found.restrict(&rows.active)).transpose()?;
            (cache, logits) = read(&texts, perturbation.as_ref())?;
            continue;
        }
        let newest: Vec<i64> = rows.active.iter().filter_map(|row| rows.said[*row].last().copied()).collect();
        let layout = Layout::of_lengths(&vec![1; newest.len()]);
        let embeddings = model.embed(&tensor::index(&newest, model.device())?)?;
        let hidden = model.hidden_cached(&Input::of_embeddings(embeddings, &layout, Pass::default())?, &mut cache)?;
        logits = model.logits(&hidden.last)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_cut_distribution() {
        let probabilities = [0.5, 0.3, 0.15, 0.05];
        let all = Sampling::default();
        assert_eq!(
            [0.0, 0.49, 0.51, 0.79, 0.81, 0.96].map(|u| draw_sorted(&probabilities, &all, u)),
            [0, 0, 1, 1, 2, 3]
        );
        let nucleus = Sampling { top_p: 0.7, ..Sampling::default() };
        assert_eq!([0.0, 0.62, 0.63, 0.99].map(|u| draw_sorted(&probabilities, &nucleus, u)), [0, 0, 1, 1]);
        let one = Sampling { top_k: 1, ..Sampling::default() };
        assert_eq!(draw_sorted(&probabilities, &one, 0.999), 0);
        // Of two tokens the first has 0.5 / 0.8 = 0.625: enough for 0.6, not for 0.65.
        for (top_p, expected) in [(0.6, 0), (0.65, 1)] {
            let both = Sampling { top_k: 2, top_p, ..Sampling::default() };
            assert_eq!(draw_sorted(&probabilities, &both, 0.999), expected, "{top_p}");
        }
    }
}
