//! Root-mean-square norm.

use tch::{Kind, Tensor};

use super::{config::NormKind, weights::WeightSource};
use crate::Result;

/// x / sqrt(mean(x²) + epsilon), times the weight; the root in float32 at least.
#[derive(Debug)]
pub(super) struct RmsNorm {
    pub(super) name: String,
    /// `[hidden]`, as stored: for [`NormKind::UnitOffset`] without the 1.
    pub(super) weight: Tensor,
    kind: NormKind,
    epsilon: f64,
}

impl RmsNorm {
    pub(super) fn load(
        source: &mut dyn WeightSource,
        name: String,
        hidden: usize,
        kind: NormKind,
        epsilon: f64,
    ) -> Result<Self> {
        let weight = source.get(&format!("{name}.weight"), &[hidden as i64])?;
        Ok(Self { name, weight, kind, epsilon })
    }

    /// `[…, hidden]` to the same.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.kind();
        let wide = if dtype == Kind::Double { Kind::Double } else { Kind::Float };
        let x = x.f_to_kind(wide)?;
        let mean = x.f_square()?.f_mean_dim([-1].as_slice(), true, None::<Kind>)?;
        let x = x.f_mul(&mean.f_add_scalar(self.epsilon)?.f_rsqrt()?)?;
        // Llama multiplies after the cast, Gemma before: in bf16 the results differ.
        match self.kind {
            NormKind::Plain => Ok(self.weight.f_mul(&x.f_to_kind(dtype)?)?),
            NormKind::UnitOffset => Ok(x.f_mul(&self.weight.f_to_kind(wide)?.f_add_scalar(1.0)?)?.f_to_kind(dtype)?),
        }
    }

    pub(super) fn frozen(&self) -> Result<Self> {
        Ok(Self { name: self.name.clone(), weight: self.weight.f_detach()?, ..*self })
    }
}
