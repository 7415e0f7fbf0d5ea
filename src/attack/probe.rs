//! What an attack works with.

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use rand_distr::Distribution;
use tch::Tensor;

use super::{draws::Draws, objective::AttackObjective, start::Start, threat::ThreatModel, warm::WarmStarts};
use crate::{Batch, CausalLm, Error, ErrorKind, Input, Pass, Perturbation, Place, Result, tensor};

/// The model, the batch and the rules, as one attack on one batch sees them.
///
/// Candidates are projected into the threat set before they are tried, [`Probe::gradient`] and [`Probe::value`] count
/// their passes, and the best candidate of each row is remembered. What an attack asks of [`Probe::model`] by itself is
/// not counted.
pub struct Probe<'a> {
    pub(super) model: &'a dyn CausalLm,
    pub(super) batch: &'a Batch,
    pub(super) objective: &'a dyn AttackObjective,
    pub(super) threat: &'a ThreatModel,
    pub(super) radius: f64,
    pub(super) dropout: bool,
    pub(super) start: Start,
    pub(super) warm: Option<&'a WarmStarts>,
    places: Vec<Place>,
    inside: HashSet<Place>,
    pub(super) random: Vec<ChaCha8Rng>,
    pub(super) log: ProbeLog,
}

/// What a probe saw.
#[derive(Debug, Default)]
pub(super) struct ProbeLog {
    /// The objective of every row at the first candidate.
    pub(super) first: Option<Vec<f64>>,
    /// The objective of every row at the last candidate.
    pub(super) last: Vec<f64>,
    /// For every row the lowest objective, and the candidate that had it.
    pub(super) best: Option<(Vec<f64>, Perturbation)>,
    pub(super) forward: u64,
    pub(super) backward: u64,
    /// Tokens that the forward passes read.
    pub(super) tokens: u64,
}

/// The objective of a candidate, and its derivative.
#[derive(Debug)]
pub struct Gradient {
    /// The objective of each row `[rows]`.
    pub values: Tensor,
    /// The derivative of the sum of all rows' objectives, at the candidate's places and sites.
    pub gradient: Perturbation,
}

impl std::fmt::Debug for Probe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe").field("threat", self.threat).field("radius", &self.radius).finish_non_exhaustive()
    }
}

impl<'a> Probe<'a> {
    pub(super) fn new(
        model: &'a dyn CausalLm,
        batch: &'a Batch,
        objective: &'a dyn AttackObjective,
        threat: &'a ThreatModel,
        radius: f64,
    ) -> Self {
        let places = threat.places(batch);
        Self {
            model,
            batch,
            objective,
            threat,
            radius,
            dropout: false,
            start: Start::Zero,
            warm: None,
            inside: places.iter().copied().collect(),
            places,
            random: Vec::new(),
            log: ProbeLog::default(),
        }
    }

    pub(super) fn draw_from(&mut self, draws: Draws, restart: usize) {
        let ids = self.batch.examples().iter().map(|example| example.id());
        self.random = ids.map(|id| draws.generator(id, restart)).collect();
    }

    /// The model, its weights out of reach of gradients. Passes made on it here are not in the statistics.
    pub fn model(&self) -> &'a dyn CausalLm {
        self.model
    }

    /// The rows under attack, with the attacked continuations alone.
    pub fn batch(&self) -> &'a Batch {
        self.batch
    }

    /// Epsilon, in the units of what is perturbed. Without a ball it still sizes the steps.
    pub fn radius(&self) -> f64 {
        self.radius
    }

    /// The tokens that may be moved.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The random generator of a row; `None` if the batch has no such row.
    pub fn random(&mut self, row: usize) -> Option<&mut ChaCha8Rng> {
        self.random.get_mut(row)
    }

    /// No perturbation at any site of the threat set.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn zero(&self) -> Result<Perturbation> {
        let size = [self.places.len() as i64, self.model.hidden_size()];
        let options = (self.model.master_kind(), self.model.device());
        let parts = (self.threat.sites.iter()).map(|site| Ok((*site, Tensor::f_zeros(size, options)?)));
        Perturbation::new(self.places.clone(), parts.collect::<Result<_>>()?)
    }

    /// Numbers drawn for each token from its row's generator, at every site, whatever the batch around the row.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn draw(&mut self, distribution: &impl Distribution<f64>) -> Result<Perturbation> {
        let hidden = self.model.hidden_size() as usize;
        self.zero()?.map(|like| {
            let rows = self.places.iter().map(|place| place.row);
            let values: Vec<f64> = rows
                .flat_map(|row| distribution.sample_iter(&mut self.random[row]).take(hidden).collect::<Vec<_>>())
                .collect();
            like_tensor(&values, like)
        })
    }

    /// The start that the framework was told to use, in the threat set: zero, random, or where the last attack on
    /// the same prompt ended.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn start(&mut self) -> Result<Perturbation> {
        let hidden = self.model.hidden_size() as usize;
        let zero = self.zero()?;
        let start = match self.start {
            Start::Zero => zero,
            start => zero.map(|like| {
                let values = start.draw(self.threat.norm, self.radius, &self.places, hidden, &mut self.random);
                like_tensor(&values, like)
            })?,
        };
        let start = match self.warm {
            Some(warm) => warm.overlay(&start, self.batch)?,
            None => start,
        };
        self.project(&start)
    }

    /// The nearest perturbation in the threat set.
    ///
    /// # Errors
    /// If the candidate has a place or a site that is not in the threat set, or libtorch fails.
    pub fn project(&self, candidate: &Perturbation) -> Result<Perturbation> {
        self.check(candidate)?;
        self.threat.project(candidate, self.radius)
    }

    /// Most candidates have all the places that there are, in order: then they need not be looked up.
    fn check(&self, candidate: &Perturbation) -> Result<()> {
        let outside = |place: &&Place| !self.inside.contains(place);
        if candidate.places() != self.places
            && let Some(place) = candidate.places().iter().find(outside)
        {
            let expected = format!("places in the region {:?} of the rows under attack", self.threat.region);
            return Err(Error::mismatch("perturbation of an attack", expected, format!("{place:?}")));
        }
        match candidate.parts().iter().find(|(site, _)| !self.threat.sites.contains(site)) {
            Some((site, _)) => {
                let expected = format!("the sites {:?}", self.threat.sites);
                Err(Error::mismatch("perturbation of an attack", expected, format!("{site:?}")))
            }
            None => Ok(()),
        }
    }

    /// Tries a candidate, projected first: one forward and one backward pass, for the perturbation alone.
    ///
    /// # Errors
    /// If the candidate has a place or a site that is not in the threat set, the objective of a row is not a finite
    /// number, or the model or the objective fails.
    pub fn gradient(&mut self, candidate: &Perturbation) -> Result<Gradient> {
        let candidate = self.project(candidate)?;
        let leaf = candidate.map(|values| Ok(values.f_detach()?.f_set_requires_grad(true)?))?;
        let values = self.objective_of(&leaf)?;
        let leaves: Vec<&Tensor> = leaf.parts().iter().map(|(_, values)| values).collect();
        let sum = values.f_sum(values.kind())?;
        let gradients = Tensor::f_run_backward(&[sum], &leaves, false, false)?;
        self.log.backward += 1;
        let gradients = gradients.into_iter().zip(&leaves).map(|(gradient, leaf)| {
            // An objective that does not depend on a site leaves its gradient undefined.
            if gradient.defined() { Ok(gradient) } else { Ok(leaf.f_zeros_like()?) }
        });
        let gradient = candidate.with_values(gradients.collect::<Result<_>>()?)?;
        let values = values.f_detach()?;
        self.record(&values, candidate)?;
        Ok(Gradient { values, gradient })
    }

    /// Tries a candidate, projected first, by one forward pass: the objective of each row `[rows]`.
    ///
    /// # Errors
    /// As [`Probe::gradient`].
    pub fn value(&mut self, candidate: &Perturbation) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let candidate = self.project(candidate)?;
        let values = self.objective_of(&candidate)?;
        self.record(&values, candidate)?;
        Ok(values)
    }

    fn objective_of(&mut self, perturbation: &Perturbation) -> Result<Tensor> {
        let (taps, last) = (self.objective.taps(), self.objective.last());
        let pass = Pass { dropout: self.dropout, taps, last, ..Pass::default() };
        let input = Input::of_batch(self.model, self.batch, Some(perturbation), pass)?;
        let hidden = self.model.hidden(&input)?;
        self.log.forward += 1;
        self.log.tokens += self.batch.layout().tokens() as u64;
        let values = self.objective.values(self.model, self.batch, self.threat.rows, &hidden)?;
        if values.size() != [self.batch.rows() as i64] {
            let expected = format!("[{}], one per row", self.batch.rows());
            return Err(Error::mismatch("values of an attack objective", expected, format!("{:?}", values.size())));
        }
        Ok(values)
    }

    fn record(&mut self, values: &Tensor, candidate: Perturbation) -> Result<()> {
        let values = tensor::numbers(values)?;
        if let Some(row) = values.iter().position(|value| !value.is_finite()) {
            let what = format!("attack objective of example {}", self.batch.examples()[row].id());
            return Err(ErrorKind::NotFinite { what, value: values[row] }.into());
        }
        self.log.first.get_or_insert_with(|| values.clone());
        self.log.best = Some(match self.log.best.take() {
            None => (values.clone(), candidate),
            Some((best, held)) => keep_lower(best, held, &values, &candidate)?,
        });
        self.log.last = values;
        Ok(())
    }
}

/// Numbers in the shape and dtype, and on the device, of another tensor.
fn like_tensor(values: &[f64], like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_view_as(like)?.f_to_kind(like.kind())?.f_to_device(like.device())?)
}

/// Row by row the perturbation with the lower value. What one of them does not move, it moves by 0.
pub(crate) fn keep_lower(
    mut best: Vec<f64>,
    held: Perturbation,
    values: &[f64],
    candidate: &Perturbation,
) -> Result<(Vec<f64>, Perturbation)> {
    let better: Vec<bool> = best.iter().zip(values).map(|(old, new)| new < old).collect();
    if !better.contains(&true) {
        return Ok((best, held));
    }
    for (old, new) in best.iter_mut().zip(values) {
        *old = old.min(*new);
    }
    let (held, candidate) = held.over_same_places(candidate)?;
    let take: Vec<bool> = held.places().iter().map(|place| better[place.row]).collect();
    let take = Tensor::f_from_slice(&take)?.f_unsqueeze(1)?;
    let held = held.zip(&candidate, |old, new| Ok(new.f_where_self(&take.f_to_device(new.device())?, old)?))?;
    Ok((best, held))
}
