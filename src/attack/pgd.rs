//! Projected gradient descent on the perturbation.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{EmbeddingAttack, Probe, ThreatModel, probe::lengths};
use crate::{Error, Perturbation, Result};

/// Projected gradient descent: d <- Proj( d - step * direction(gradient) ), the paper's attack (Xhonneux et al., section 3.1)
/// with every choice open.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `threat` | [`ThreatModel::default`] | what may be moved, and how far | |
/// | `steps` | 10 | forward and backward passes | at least 1 |
/// | `rule` | `sign` | the direction of a step | |
/// | `momentum` | none | a decaying sum of directions instead of the last | decay 0 to below 1 |
/// | `size` | `{ decaying = 1.0 }` | the length of a step | above 0 |
///
/// The default steps are (1 - t/K) epsilon long for t = 0 … K-1: they begin with the whole radius and end inside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pgd {
    /// What may be moved, and how far.
    pub threat: ThreatModel,
    /// Forward and backward passes.
    pub steps: usize,
    /// The direction of a step.
    pub rule: StepRule,
    /// A decaying sum of directions instead of the last one; not with Adam, which has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<Momentum>,
    /// The length of a step.
    pub size: StepSize,
}

/// The direction of a step, from the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepRule {
    /// The sign of every number of the gradient (the paper's).
    Sign,
    /// The gradient of each token divided by its L2 norm.
    L2,
    /// Adam (Kingma and Ba 2015), each number on its own.
    Adam {
        /// Decay of the mean gradient.
        beta1: f64,
        /// Decay of the mean square.
        beta2: f64,
        /// Added to the root of the mean square.
        epsilon: f64,
    },
}

/// A sum of normalised gradients (each token's divided by its L2 norm), of which all but the last decay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Momentum {
    /// What is left of the sum at each step.
    pub decay: f64,
}

/// The length of a step. A relative step of 1 moves a token by the radius: for [`StepRule::Sign`] and [`StepRule::Adam`]
/// every number by radius / sqrt(hidden).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepSize {
    /// The same number for every step: what each number of a token moves by (sign, Adam), or a token's L2 distance. The
    /// paper's is 1e-4.
    Absolute(f64),
    /// The same share of the radius for every step.
    Constant(f64),
    /// This share of the radius at first, then linearly less: times (1 - t/K) at step t of K.
    Decaying(f64),
}

impl Default for Pgd {
    fn default() -> Self {
        Self {
            threat: ThreatModel::default(),
            steps: 10,
            rule: StepRule::Sign,
            momentum: None,
            size: StepSize::Decaying(1.0),
        }
    }
}

impl Pgd {
    /// The attack that measures robustness, the same for all models compared: 20 steps along a momentum (0.9) of the
    /// gradient normalised per token, (1 - t/20) epsilon long. Run it with [`super::AttackSettings`] of three restarts from
    /// a uniform start, and the best iterate.
    pub fn measuring(threat: ThreatModel) -> Self {
        Self {
            threat,
            steps: 20,
            rule: StepRule::L2,
            momentum: Some(Momentum { decay: 0.9 }),
            size: StepSize::Decaying(1.0),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.threat.validate()?;
        if self.steps == 0 {
            return Err(Error::setting("attack.steps", 0, "at least 1"));
        }
        let (StepSize::Absolute(size) | StepSize::Constant(size) | StepSize::Decaying(size)) = self.size;
        if !(size > 0.0 && size.is_finite()) {
            return Err(Error::setting("attack.size", size, "above 0 and finite"));
        }
        if let Some(Momentum { decay }) = self.momentum
            && !(0.0..1.0).contains(&decay)
        {
            return Err(Error::setting("attack.momentum.decay", decay, "at least 0 and below 1"));
        }
        if let StepRule::Adam { beta1, beta2, epsilon } = self.rule {
            for (field, beta) in [("attack.rule.adam.beta1", beta1), ("attack.rule.adam.beta2", beta2)] {
                if !(0.0..1.0).contains(&beta) {
                    return Err(Error::setting(field, beta, "at least 0 and below 1"));
                }
            }
            if !(epsilon > 0.0 && epsilon.is_finite()) {
                return Err(Error::setting("attack.rule.adam.epsilon", epsilon, "above 0"));
            }
            if self.momentum.is_some() {
                return Err(Error::setting("attack.momentum", "set", "left out with Adam, which has its own"));
            }
        }
        Ok(())
    }

    /// What a step multiplies its direction by: a number per coordinate for sign and Adam, a distance for L2.
    fn length(&self, step: usize, hidden_size: i64, radius: f64) -> f64 {
        let unit = match self.rule {
            StepRule::L2 => radius,
            StepRule::Sign | StepRule::Adam { .. } => radius / (hidden_size as f64).sqrt(),
        };
        match self.size {
            StepSize::Absolute(size) => size,
            StepSize::Constant(share) => share * unit,
            StepSize::Decaying(share) => share * unit * (1.0 - step as f64 / self.steps as f64),
        }
    }
}

/// What a step rule remembers between steps, for one site.
enum Memory {
    Plain,
    Momentum(Tensor),
    Adam { mean: Tensor, square: Tensor },
}

impl Pgd {
    fn memory(&self, like: &Tensor) -> Result<Memory> {
        Ok(match (self.rule, self.momentum) {
            (StepRule::Adam { .. }, _) => Memory::Adam { mean: like.f_zeros_like()?, square: like.f_zeros_like()? },
            (_, Some(_)) => Memory::Momentum(like.f_zeros_like()?),
            (_, None) => Memory::Plain,
        })
    }

    /// The direction of step `step` from a gradient `[places, hidden]`.
    fn direction(&self, gradient: &Tensor, memory: &mut Memory, step: usize) -> Result<Tensor> {
        let followed = match memory {
            Memory::Plain => gradient.shallow_clone(),
            Memory::Momentum(sum) => {
                let decay = self.momentum.map_or(0.0, |momentum| momentum.decay);
                *sum = sum.f_mul_scalar(decay)?.f_add(&gradient.f_div(&lengths(gradient)?)?)?;
                sum.shallow_clone()
            }
            Memory::Adam { mean, square } => return self.adam(gradient, mean, square, step),
        };
        match self.rule {
            StepRule::Sign => Ok(followed.f_sign()?),
            _ => Ok(followed.f_div(&lengths(&followed)?)?),
        }
    }

    fn adam(&self, gradient: &Tensor, mean: &mut Tensor, square: &mut Tensor, step: usize) -> Result<Tensor> {
        let StepRule::Adam { beta1, beta2, epsilon } = self.rule else { return Ok(gradient.shallow_clone()) };
        *mean = mean.f_mul_scalar(beta1)?.f_add(&gradient.f_mul_scalar(1.0 - beta1)?)?;
        *square = square.f_mul_scalar(beta2)?.f_add(&gradient.f_square()?.f_mul_scalar(1.0 - beta2)?)?;
        let count = step as i32 + 1;
        let mean = mean.f_div_scalar(1.0 - beta1.powi(count))?;
        let root = square.f_div_scalar(1.0 - beta2.powi(count))?.f_sqrt()?;
        Ok(mean.f_div(&root.f_add_scalar(epsilon)?)?)
    }
}

impl EmbeddingAttack for Pgd {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut current = probe.start()?;
        let mut memories = current.parts().iter().map(|(_, like)| self.memory(like)).collect::<Result<Vec<_>>>()?;
        let hidden_size = probe.model().hidden_size();
        for step in 0..self.steps {
            let gradient = probe.gradient(&current)?.gradient;
            let _guard = tch::no_grad_guard();
            let length = self.length(step, hidden_size, probe.radius());
            let mut memory = memories.iter_mut();
            let moved = current.zip(&gradient, |values, gradient| {
                let direction = match memory.next() {
                    Some(memory) => self.direction(gradient, memory, step)?,
                    None => gradient.shallow_clone(),
                };
                Ok(values.f_sub(&direction.f_mul_scalar(length)?)?)
            })?;
            current = probe.project(&moved)?;
        }
        Ok(vec![current])
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn reach(&self, hidden_size: i64, radius: f64) -> Option<f64> {
        let total: f64 = (0..self.steps).map(|step| self.length(step, hidden_size, radius)).sum();
        Some(match self.rule {
            StepRule::L2 => total,
            StepRule::Sign | StepRule::Adam { .. } => total * (hidden_size as f64).sqrt(),
        })
    }
}
