//! Projected gradient descent on the perturbation.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{EmbeddingAttack, Norm, Probe, ThreatModel};
use crate::{Error, Perturbation, Result};

/// Projected gradient descent: d <- Proj( d - step * direction(gradient) ), the paper's attack (Xhonneux et al.,
/// section 3.1) with every choice open.
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
    /// The gradient divided by its size in the norm of the threat set: each token's by its L2 norm, with [`Norm::Linf`]
    /// by its largest number, and with [`Norm::RowL2`] each row's by the L2 norm of the row.
    L2,
    /// The square root of every number of the gradient, with its sign, divided as [`StepRule::L2`] divides: between the
    /// sign, which moves all numbers alike, and the gradient itself, which moves few.
    Root,
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

/// A sum of normalised gradients (as [`StepRule::L2`] divides them), of which all but the last decay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Momentum {
    /// What is left of the sum at each step.
    pub decay: f64,
}

/// The length of a step. A relative step of 1 is one radius long in the norm of the threat set: with [`StepRule::L2`] and
/// [`StepRule::Root`] that is how far a token moves, or a row with [`Norm::RowL2`]. With [`StepRule::Sign`] and [`StepRule::Adam`] every
/// number moves by radius / sqrt(n), n being how many numbers the norm is taken of (a token's, or with [`Norm::RowL2`]
/// a row's), and with [`Norm::Linf`] by the radius.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepSize {
    /// The same for every step: what each number moves by (sign, Adam; the paper's is 1e-4), or how far a token or a
    /// row does in the norm.
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
    /// gradient normalised per token, (1 - t/20) epsilon long. Run it with [`super::AttackSettings::measuring`].
    pub fn measuring(threat: ThreatModel) -> Self {
        Self {
            threat,
            steps: 20,
            rule: StepRule::L2,
            momentum: Some(Momentum { decay: 0.9 }),
            size: StepSize::Decaying(1.0),
        }
    }

    /// What a step multiplies its direction by.
    fn length(&self, step: usize, hidden_size: i64, radius: f64) -> f64 {
        let unit = if self.moves_numbers() && self.threat.norm != Norm::Linf {
            radius / (hidden_size as f64).sqrt()
        } else {
            radius
        };
        match self.size {
            StepSize::Absolute(size) => size,
            StepSize::Constant(share) => share * unit,
            StepSize::Decaying(share) => share * unit * (1.0 - step as f64 / self.steps as f64),
        }
    }

    /// Whether a direction is about 1 in every number, rather than in the norm.
    fn moves_numbers(&self) -> bool {
        matches!(self.rule, StepRule::Sign | StepRule::Adam { .. })
    }

    /// Where a step is shared among the tokens of a row, what each gets of it `[places, 1]`: 1 / sqrt(tokens).
    fn share_of_row(&self, start: &Perturbation) -> Result<Option<Tensor>> {
        let absolute = matches!(self.size, StepSize::Absolute(_));
        if self.threat.norm != Norm::RowL2 || !self.moves_numbers() || absolute {
            return Ok(None);
        }
        let Some((_, like)) = start.parts().first() else { return Ok(None) };
        let ones = Tensor::f_ones([start.places().len() as i64, 1], (like.kind(), like.device()))?;
        Ok(Some(self.threat.sizes(&ones, &start.rows()?)?.f_reciprocal()?.f_unsqueeze(1)?))
    }
}

/// What a step rule remembers between steps, for one site.
enum Memory {
    Plain,
    Momentum { decay: f64, sum: Tensor },
    Adam(AdamMemory),
}

struct AdamMemory {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    mean: Tensor,
    square: Tensor,
}

impl AdamMemory {
    /// The direction of step `step` from a gradient.
    fn direction(&mut self, gradient: &Tensor, step: usize) -> Result<Tensor> {
        let Self { beta1, beta2, epsilon, .. } = *self;
        self.mean = self.mean.f_mul_scalar(beta1)?.f_add(&gradient.f_mul_scalar(1.0 - beta1)?)?;
        self.square = self.square.f_mul_scalar(beta2)?.f_add(&gradient.f_square()?.f_mul_scalar(1.0 - beta2)?)?;
        let count = step as i32 + 1;
        let mean = self.mean.f_div_scalar(1.0 - beta1.powi(count))?;
        let root = self.square.f_div_scalar(1.0 - beta2.powi(count))?.f_sqrt()?;
        Ok(mean.f_div(&root.f_add_scalar(epsilon)?)?)
    }
}

impl Pgd {
    fn memory(&self, like: &Tensor) -> Result<Memory> {
        Ok(match (self.rule, self.momentum) {
            (StepRule::Adam { beta1, beta2, epsilon }, _) => {
                let (mean, square) = (like.f_zeros_like()?, like.f_zeros_like()?);
                Memory::Adam(AdamMemory { beta1, beta2, epsilon, mean, square })
            }
            (_, Some(Momentum { decay })) => Memory::Momentum { decay, sum: like.f_zeros_like()? },
            (_, None) => Memory::Plain,
        })
    }

    /// A gradient `[places, hidden]` divided by its size in the norm; `rows` is the row of each place.
    fn normalised(&self, gradient: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let floor = if gradient.kind() == Kind::Double { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
        Ok(gradient.f_div(&self.threat.sizes(gradient, rows)?.f_clamp_min(floor)?.f_unsqueeze(1)?)?)
    }

    /// The direction of step `step` from a gradient `[places, hidden]`.
    fn direction(&self, gradient: &Tensor, rows: &Tensor, memory: &mut Memory, step: usize) -> Result<Tensor> {
        let followed = match memory {
            Memory::Plain => gradient.shallow_clone(),
            Memory::Momentum { decay, sum } => {
                *sum = sum.f_mul_scalar(*decay)?.f_add(&self.normalised(gradient, rows)?)?;
                sum.shallow_clone()
            }
            Memory::Adam(memory) => return memory.direction(gradient, step),
        };
        match self.rule {
            StepRule::Sign => Ok(followed.f_sign()?),
            StepRule::Root => {
                let unit = self.normalised(&followed, rows)?;
                self.normalised(&unit.f_sign()?.f_mul(&unit.f_abs()?.f_sqrt()?)?, rows)
            }
            _ => self.normalised(&followed, rows),
        }
    }
}

impl EmbeddingAttack for Pgd {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn validate(&self) -> Result<()> {
        self.threat.validate()?;
        Error::check_count("attack.steps", self.steps)?;
        let (StepSize::Absolute(size) | StepSize::Constant(size) | StepSize::Decaying(size)) = self.size;
        Error::check_positive("attack.size", size)?;
        if let Some(Momentum { decay }) = self.momentum {
            Error::check_below_one("attack.momentum.decay", decay)?;
        }
        if let StepRule::Adam { beta1, beta2, epsilon } = self.rule {
            Error::check_below_one("attack.rule.adam.beta1", beta1)?;
            Error::check_below_one("attack.rule.adam.beta2", beta2)?;
            Error::check_positive("attack.rule.adam.epsilon", epsilon)?;
            if self.momentum.is_some() {
                return Err(Error::setting("attack.momentum", "set", "left out with Adam, which has its own"));
            }
        }
        Ok(())
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut current = probe.start()?;
        let mut memories = current.parts().iter().map(|(_, like)| self.memory(like)).collect::<Result<Vec<_>>>()?;
        let (rows, share_of_row) = (current.rows()?, self.share_of_row(&current)?);
        let hidden_size = probe.model().hidden_size();
        for step in 0..self.steps {
            let gradient = probe.gradient(&current)?.gradient;
            let _guard = tch::no_grad_guard();
            let length = self.length(step, hidden_size, probe.radius());
            let mut memory = memories.iter_mut();
            let moved = current.zip(&gradient, |values, gradient| {
                let mut direction = match memory.next() {
                    Some(memory) => self.direction(gradient, &rows, memory, step)?,
                    None => gradient.shallow_clone(),
                };
                if let Some(share) = &share_of_row {
                    direction = direction.f_mul(share)?;
                }
                Ok(values.f_sub(&direction.f_mul_scalar(length)?)?)
            })?;
            current = probe.project(&moved)?;
        }
        Ok(vec![current])
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    /// Of Adam each number of a direction is taken to be 1.
    fn reach(&self, hidden_size: i64, radius: f64) -> Option<f64> {
        let total: f64 = (0..self.steps).map(|step| self.length(step, hidden_size, radius)).sum();
        match (self.threat.norm, self.size) {
            (Norm::Linf, _) => Some(total),
            _ if !self.moves_numbers() => Some(total),
            // How far a row moves depends on how many tokens it has.
            (Norm::RowL2, StepSize::Absolute(_)) => None,
            (Norm::L2 | Norm::RowL2, _) => Some(total * (hidden_size as f64).sqrt()),
        }
    }
}
