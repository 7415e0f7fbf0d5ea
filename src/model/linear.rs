//! A linear layer, with or without a low-rank adapter.

use tch::{Kind, Tensor};

use super::{causal_lm::Adapter, product, weights::WeightSource};
use crate::Result;

/// y = x Wᵀ + b, plus scale * drop(x) Aᵀ Bᵀ where there is an adapter (LoRA, Hu et al. 2021).
#[derive(Debug)]
pub(super) struct Linear {
    /// The module's Hugging Face name, "model.layers.0.self_attn.q_proj" say.
    pub(super) name: String,
    /// `[out, in]` in the compute dtype.
    pub(super) weight: Tensor,
    /// Where the adapter is merged into the weight: the weight without it, for [`Adapter::Off`]. Boxed, since only frozen
    /// layers have one.
    original: Option<Box<Tensor>>,
    /// `[out]`.
    pub(super) bias: Option<Tensor>,
    pub(super) lora: Option<Lora>,
}

/// The factors of a low-rank adapter, in the master dtype.
#[derive(Debug)]
pub(super) struct Lora {
    /// `[rank, in]`.
    pub(super) a: Tensor,
    /// `[out, rank]`.
    pub(super) b: Tensor,
    pub(super) scale: f64,
    pub(super) dropout: f64,
}

/// How the layers of a pass behave.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinearMode {
    pub(super) adapter: Adapter,
    pub(super) dropout: bool,
}

impl Linear {
    pub(super) fn load(source: &mut dyn WeightSource, name: String, size: [usize; 2], bias: bool) -> Result<Self> {
        let [inputs, outputs] = size.map(|len| len as i64);
        let weight = source.get(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = if bias { Some(source.get(&format!("{name}.bias"), &[outputs])?) } else { None };
        Ok(Self { name, weight, original: None, bias, lora: None })
    }

    pub(super) fn inputs(&self) -> i64 {
        self.weight.size()[1]
    }

    pub(super) fn outputs(&self) -> i64 {
        self.weight.size()[0]
    }

    /// Whether a pass with dropout drops anything here.
    pub(super) fn drops(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0)
    }

    /// `[n, in]` to `[n, out]`.
    pub(super) fn forward(&self, x: &Tensor, mode: LinearMode) -> Result<Tensor> {
        let weight = match &self.original {
            Some(original) if mode.adapter == Adapter::Off => original,
            _ => &self.weight,
        };
        let y = product::linear(x, weight, self.bias.as_ref())?;
        match &self.lora {
            Some(lora) if mode.adapter == Adapter::On => lora.add_to(&y, x, mode.dropout),
            _ => Ok(y),
        }
    }

    /// The weight with the adapter in it, a new tensor outside any graph; computed in the master dtype and rounded
    /// once.
    pub(super) fn merged(&self) -> Result<Tensor> {
        let weight = self.weight.f_detach()?;
        match &self.lora {
            Some(lora) => {
                let product = lora.b.f_detach()?.f_matmul(&lora.a.f_detach()?)?.f_mul_scalar(lora.scale)?;
                Ok(weight.f_to_kind(product.kind())?.f_add(&product)?.f_to_kind(weight.kind())?)
            }
            None => Ok(weight),
        }
    }

    /// The same layer out of reach of gradients: adapter merged, or kept beside the weight. The original weight is
    /// shared, not copied. In half precision it is never merged: an adapter's early changes are smaller than half a unit in
    /// a weight's last place, and would be rounded away.
    pub(super) fn frozen(&self, merge: bool) -> Result<Self> {
        let weight = self.weight.f_detach()?;
        let bias = self.bias.as_ref().map(Tensor::f_detach).transpose()?;
        let same = Self { name: self.name.clone(), weight, original: None, bias, lora: None };
        Ok(match &self.lora {
            Some(lora) if merge && lora.a.kind() == self.weight.kind() => {
                Self { weight: self.merged()?, original: Some(Box::new(same.weight)), ..same }
            }
            Some(lora) => {
                let (a, b) = (lora.a.f_detach()?, lora.b.f_detach()?.f_mul_scalar(lora.scale)?);
                let [a, b] = [a, b].map(|factor| factor.f_to_kind(self.weight.kind()));
                Self { lora: Some(Lora { a: a?, b: b?, scale: 1.0, ..*lora }), ..same }
            }
            None => {
                Self { original: self.original.as_ref().map(|one| one.f_detach().map(Box::new)).transpose()?, ..same }
            }
        })
    }
}

impl Lora {
    /// y `[n, out]` plus the adapter's part of x `[n, in]`.
    fn add_to(&self, y: &Tensor, x: &Tensor, dropout: bool) -> Result<Tensor> {
        let kind: Kind = x.kind();
        let a = self.a.f_to_kind(kind)?;
        let b = self.b.f_to_kind(kind)?;
        let x = if dropout && self.dropout > 0.0 { &x.f_dropout(self.dropout, true)? } else { x };
        let low = product::linear(x, &a, None)?;
        // Scaled where it is narrow; frozen factors have the scale in them.
        let low = if self.scale == 1.0 { low } else { low.f_mul_scalar(self.scale)? };
        product::linear_onto(y, &low, &b)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Dropout takes whole inputs of A and grows the others by 1 / (1 - p): with inputs 1, 2, 4, … and factors of ones, the
    /// adapter's part says which were kept.
    #[test]
    fn dropout_is_on_the_adapters_input_alone() {
        const ROWS: i64 = 64;
        const INPUTS: i64 = 10;
        let options = (Kind::Double, Device::Cpu);
        let lora =
            Lora { a: Tensor::ones([1, INPUTS], options), b: Tensor::ones([3, 1], options), scale: 0.5, dropout: 0.25 };
        let weight = Tensor::arange(3 * INPUTS, options).view([3, INPUTS]);
        let linear =
            Linear { name: "linear".into(), weight: weight.copy(), original: None, bias: None, lora: Some(lora) };
        let x = Tensor::from(2.0).pow(&Tensor::arange(INPUTS, options)).repeat([ROWS, 1]);
        let y = linear.forward(&x, LinearMode { adapter: Adapter::On, dropout: true }).unwrap();
        let sums = (y - x.matmul(&weight.tr())) / 0.5 * 0.75;
        let mut kept = 0;
        let mut different = std::collections::BTreeSet::new();
        for row in 0..ROWS {
            let sum = [0, 1, 2].map(|out| sums.double_value(&[row, out]));
            assert!(sum.iter().all(|sum| (sum - sum.round()).abs() < 1e-9), "{sum:?}");
            let sum = sum.map(|sum| sum.round() as u64);
            assert!(sum == [sum[0]; 3] && sum[0] < 1 << INPUTS, "{sum:?}");
            kept += sum[0].count_ones();
            different.insert(sum[0]);
        }
        // Six standard deviations.
        assert!((f64::from(kept) / (ROWS * INPUTS) as f64 - 0.75).abs() < 0.1, "{kept}");
        assert!(different.len() > 10, "{different:?}");
    }
}
