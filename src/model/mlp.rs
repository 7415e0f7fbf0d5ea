//! The gated feed-forward layer.

use tch::Tensor;

use super::{
    config::{Activation, DecoderConfig, Projection},
    linear::{Linear, LinearMode},
    weights::WeightSource,
};
use crate::Result;

/// down(activation(gate(x)) * up(x)).
#[derive(Debug)]
pub(super) struct GatedMlp {
    gate_up: GateUp,
    down: Linear,
    activation: Activation,
}

#[derive(Debug)]
enum GateUp {
    Split { gate: Linear, up: Linear },
    Fused(Linear),
}

impl GatedMlp {
    pub(super) fn load(source: &mut dyn WeightSource, prefix: &str, config: &DecoderConfig) -> Result<Self> {
        let (hidden, wide) = (config.hidden, config.intermediate);
        let mut projection =
            |name: &str, size| Linear::load(source, format!("{prefix}.{name}_proj"), size, config.mlp_bias);
        let gate_up = match config.gate_up {
            Projection::Split => {
                GateUp::Split { gate: projection("gate", [hidden, wide])?, up: projection("up", [hidden, wide])? }
            }
            Projection::Fused => GateUp::Fused(projection("gate_up", [hidden, 2 * wide])?),
        };
        Ok(Self { gate_up, down: projection("down", [wide, hidden])?, activation: config.activation })
    }

    /// `[tokens, hidden]` to the same.
    pub(super) fn forward(&self, x: &Tensor, mode: LinearMode) -> Result<Tensor> {
        let (gate, up) = match &self.gate_up {
            GateUp::Split { gate, up } => (gate.forward(x, mode)?, up.forward(x, mode)?),
            GateUp::Fused(fused) => {
                let both = fused.forward(x, mode)?;
                let wide = both.size()[1] / 2;
                (both.f_narrow(1, 0, wide)?, both.f_narrow(1, wide, wide)?)
            }
        };
        let gate = match self.activation {
            Activation::Silu => gate.f_silu()?,
            Activation::GeluTanh => gate.f_gelu("tanh")?,
            Activation::Gelu => gate.f_gelu("none")?,
        };
        self.down.forward(&gate.f_mul(&up)?, mode)
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        match &self.gate_up {
            GateUp::Split { gate, up } => vec![gate, up, &self.down],
            GateUp::Fused(fused) => vec![fused, &self.down],
        }
    }

    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match &mut self.gate_up {
            GateUp::Split { gate, up } => vec![gate, up, &mut self.down],
            GateUp::Fused(fused) => vec![fused, &mut self.down],
        }
    }

    pub(super) fn frozen(&self, merge: bool) -> Result<Self> {
        let gate_up = match &self.gate_up {
            GateUp::Split { gate, up } => GateUp::Split { gate: gate.frozen(merge)?, up: up.frozen(merge)? },
            GateUp::Fused(fused) => GateUp::Fused(fused.frozen(merge)?),
        };
        Ok(Self { gate_up, down: self.down.frozen(merge)?, activation: self.activation })
    }
}
