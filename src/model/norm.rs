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
        if x.device().is_cuda() {
            return self.fused(x, wide);
        }
        let x = x.f_to_kind(wide)?;
        let mean = x.f_square()?.f_mean_dim([-1].as_slice(), true, None::<Kind>)?;
        let x = x.f_mul(&mean.f_add_scalar(self.epsilon)?.f_rsqrt()?)?;
        // Llama multiplies after the cast, Gemma before: in bf16 the results differ.
        match self.kind {
            NormKind::Plain => Ok(self.weight.f_mul(&x.f_to_kind(dtype)?)?),
            NormKind::UnitOffset => Ok(x.f_mul(&self.weight.f_to_kind(wide)?.f_add_scalar(1.0)?)?.f_to_kind(dtype)?),
        }
    }

    /// The same by libtorch's own norm, with the same casts: on a GPU few rows are little work for each operation.
    fn fused(&self, x: &Tensor, wide: Kind) -> Result<Tensor> {
        let hidden = self.weight.size();
        match self.kind {
            // Its sums are in float32 whatever the dtype.
            NormKind::Plain => Ok(self.weight.f_mul(&x.f_rms_norm(hidden, None::<&Tensor>, self.epsilon)?)?),
            NormKind::UnitOffset => {
                let weight = self.weight.f_to_kind(wide)?.f_add_scalar(1.0)?;
                Ok(x.f_to_kind(wide)?.f_rms_norm(hidden, Some(&weight), self.epsilon)?.f_to_kind(x.kind())?)
            }
        }
    }

    pub(super) fn frozen(&self) -> Result<Self> {
        Ok(Self { name: self.name.clone(), weight: self.weight.f_detach()?, ..*self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds to the nearest bfloat16, ties to even: the upper half of a float32.
    fn bf16(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
    }

    /// The forward pass, and the one for GPUs, which gives the same numbers here.
    fn found(kind: NormKind, weight: &[f32], x: &[f32]) -> Vec<f32> {
        let narrow = |values: &[f32]| Tensor::from_slice(values).to_kind(Kind::BFloat16);
        let norm = RmsNorm { name: "norm".into(), weight: narrow(weight), kind, epsilon: 1e-6 };
        let [y, on_gpu] = [norm.forward(&narrow(x)), norm.fused(&narrow(x), Kind::Float)].map(|y| {
            let y = y.unwrap();
            assert_eq!(y.kind(), Kind::BFloat16);
            Vec::try_from(y.to_kind(Kind::Float)).unwrap()
        });
        assert_eq!(y, on_gpu);
        y
    }

    /// Where the casts are tells Llama's norm from Gemma's; each order must give other numbers somewhere, or this says nothing.
    #[test]
    fn the_cast_comes_where_the_family_has_it() {
        let x: Vec<f32> = (0..64).map(|i| bf16((i as f32 * 1.7).sin() * 3.0)).collect();
        let weight: Vec<f32> = (0..64).map(|i| bf16(0.4 + (i as f32 * 0.9).cos() * 0.3)).collect();
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let root = 1.0 / (mean + 1e-6).sqrt();
        let expected = |order: fn(f32, f32) -> f32| -> Vec<f32> {
            x.iter().zip(&weight).map(|(x, w)| order(x * root, *w)).collect()
        };
        let plain = expected(|x, w| bf16(bf16(x) * w));
        assert_eq!(found(NormKind::Plain, &weight, &x), plain);
        assert_ne!(plain, expected(|x, w| bf16(x * w)));
        let unit_offset = expected(|x, w| bf16(x * (1.0 + w)));
        assert_eq!(found(NormKind::UnitOffset, &weight, &x), unit_offset);
        assert_ne!(unit_offset, expected(|x, w| bf16(bf16(x) * (1.0 + w))));
        assert_ne!(unit_offset, expected(|x, w| bf16(x * bf16(1.0 + w))));
    }
}
