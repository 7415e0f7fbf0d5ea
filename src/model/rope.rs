//! Rotary position embedding (Su et al. 2021) and its stretched forms.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use super::{
    config::{RopeConfig, RopeScaling},
    plan::Plan,
};
use crate::{Result, tensor::index};

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub(super) struct Rope {
    config: RopeConfig,
    /// For texts of ordinary length.
    frequencies: Vec<f64>,
    /// For texts beyond the switch of [`RopeScaling::Long`].
    long_frequencies: Option<Vec<f64>>,
}

/// Cosine and sine of the angle of every token, `[tokens, 1, rotary_dim]` each.
#[derive(Debug)]
pub(super) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(super) fn new(config: &RopeConfig) -> Self {
        let base: Vec<f64> =
            (0..config.rotary_dim / 2).map(|i| config.theta.powf(-2.0 * i as f64 / config.rotary_dim as f64)).collect();
        let scaled = |by: &[f64]| base.iter().zip(by).map(|(frequency, factor)| frequency / factor).collect();
        let (frequencies, long_frequencies) = match &config.scaling {
            RopeScaling::None => (base, None),
            RopeScaling::Linear { factor } => (base.iter().map(|frequency| frequency / factor).collect(), None),
            RopeScaling::Llama3 { factor, low, high, original } => {
                (base.iter().map(|frequency| llama3(*frequency, *factor, *low, *high, *original)).collect(), None)
            }
            RopeScaling::Long { short, long, .. } => (scaled(short), Some(scaled(long))),
        };
        Self { config: config.clone(), frequencies, long_frequencies }
    }

    /// The rotation of tokens at these positions; `text_lengths` is, for each token, the length of the text that it is part
    /// of, which decides between short and long factors.
    pub(super) fn rotation(
        &self,
        positions: &[i64],
        text_lengths: &[usize],
        kind: Kind,
        device: Device,
    ) -> Result<Rotation> {
        let tokens = || positions.iter().zip(text_lengths).map(|(position, length)| (*position, self.is_long(*length)));
        // Rows have positions in common: each is computed once.
        let mut distinct: Vec<(i64, bool)> = tokens().collect();
        distinct.sort_unstable();
        distinct.dedup();
        let mut cos = Vec::with_capacity(distinct.len() * self.config.rotary_dim);
        let mut sin = Vec::with_capacity(cos.capacity());
        let factor = self.attention_factor();
        // Angles in float64 whatever the model's dtype: bf16 cannot tell position 256 from 257.
        for (position, long) in &distinct {
            let angles = self.frequencies_for(*long).iter().map(|frequency| (*position as f64 * frequency).sin_cos());
            let half: Vec<(f64, f64)> = angles.map(|(s, c)| (s * factor, c * factor)).collect();
            sin.extend(half.iter().chain(&half).map(|(s, _)| s));
            cos.extend(half.iter().chain(&half).map(|(_, c)| c));
        }
        let places: Vec<i64> =
            tokens().map(|token| distinct.binary_search(&token).unwrap_or_default() as i64).collect();
        let places = index(&places, device)?;
        let size = [distinct.len() as i64, 1, self.config.rotary_dim as i64];
        let tensor = |values: &[f64]| -> Result<Tensor> {
            let table = Tensor::f_from_slice(values)?.f_view(size)?.f_to_kind(kind)?.f_to_device(device)?;
            Ok(table.f_index_select(0, &places)?)
        };
        Ok(Rotation { cos: tensor(&cos)?, sin: tensor(&sin)? })
    }

    /// The length of the longest text with the ordinary frequencies, where there are others.
    pub(super) fn switch(&self) -> Option<usize> {
        match self.config.scaling {
            RopeScaling::Long { original, .. } => Some(original),
            _ => None,
        }
    }

    fn is_long(&self, text_length: usize) -> bool {
        self.switch().is_some_and(|longest| text_length > longest)
    }

    fn frequencies_for(&self, long: bool) -> &[f64] {
        self.long_frequencies.as_ref().filter(|_| long).unwrap_or(&self.frequencies)
    }

    fn attention_factor(&self) -> f64 {
        match self.config.scaling {
            RopeScaling::Long { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength < original / high {
        return frequency;
    }
    if wavelength > original / low {
        return frequency / factor;
    }
    let smooth = (original / wavelength - low) / (high - low);
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

impl Rotation {
    /// The rotation of the tokens that ask.
    pub(super) fn asking(&self, plan: &Plan) -> Result<Self> {
        Ok(Self { cos: plan.asking(&self.cos)?, sin: plan.asking(&self.sin)? })
    }

    /// Rotates `[tokens, heads, head_dim]`: the first `rotary_dim` numbers of each head, in halves.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let rotary = self.cos.size()[2];
        let rest = x.size()[2] - rotary;
        let turned = x.f_narrow(2, 0, rotary)?;
        let first = turned.f_narrow(2, 0, rotary / 2)?;
        let second = turned.f_narrow(2, rotary / 2, rotary / 2)?;
        let crossed = Tensor::f_cat(&[&second.f_neg()?, &first], 2)?;
        let turned = turned.f_mul(&self.cos)?.f_add(&crossed.f_mul(&self.sin)?)?;
        if rest == 0 {
            return Ok(turned);
        }
        Ok(Tensor::f_cat(&[&turned, &x.f_narrow(2, rotary, rest)?], 2)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bfloat16 counts in steps of 2 from 256 on; an angle computed in it would be that of 256 at 257.
    #[test]
    fn angles_are_exact_where_bfloat16_cannot_count() {
        let rope = Rope::new(&RopeConfig { theta: 10_000.0, rotary_dim: 8, scaling: RopeScaling::None });
        let positions = [256, 257, 100_001];
        let rotation = rope.rotation(&positions, &[100_002; 3], Kind::BFloat16, Device::Cpu).unwrap();
        for (of, numbers) in [(f64::cos as fn(f64) -> f64, &rotation.cos), (f64::sin, &rotation.sin)] {
            assert_eq!((numbers.kind(), numbers.size()), (Kind::BFloat16, vec![3, 1, 8]));
            for (row, position) in positions.iter().enumerate() {
                for i in 0..8 {
                    let exact = of(*position as f64 / 10_000f64.powf((i % 4) as f64 / 4.0));
                    let found = numbers.double_value(&[row as i64, 0, i]);
                    // Half a unit in the last of bfloat16's eight places.
                    assert!((found - exact).abs() <= exact.abs() / 256.0, "{position}, {i}: {found}, not {exact}");
                }
            }
        }
    }
}
