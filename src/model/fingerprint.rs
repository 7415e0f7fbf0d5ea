//! What tells models with different numbers apart.

use sha2::{Digest, Sha256};
use tch::Tensor;

use super::causal_lm::Parameter;
use crate::{Result, digest::hex, tensor};

/// Of the shapes and of up to 4096 numbers of each tensor: what differs nowhere else shares it.
pub(super) fn of(parameters: &[Parameter]) -> Result<String> {
    let _guard = tch::no_grad_guard();
    let mut hash = Sha256::new();
    for Parameter { name, tensor } in parameters {
        hash.update(format!("{name} {:?}", tensor.size()));
        for number in sample(tensor)? {
            hash.update(number.to_le_bytes());
        }
    }
    Ok(hex(&hash.finalize()))
}

/// At most 4096 numbers of a tensor, evenly spread, all of them where there are no more: exact, and so the same on every
/// device and in every dtype that holds them. The step is odd, so that it does not stay in one column of a matrix whose
/// width is a power of two.
fn sample(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = tensor.f_reshape([-1])?;
    let step = flat.numel().max(1).div_ceil(4096) | 1;
    tensor::numbers(&flat.f_slice(0, None, None, step as i64)?)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_large_tensor_is_sampled_over_its_whole_length() {
        for (count, step, expected) in
            [(4096, 1, 4096), (4097, 3, 1366), (1_000_000, 245, 4082), (1 << 24, 4097, 4096), (0, 1, 0)]
        {
            let found = sample(&Tensor::arange(count, (Kind::Float, Device::Cpu)).view([-1, 1])).unwrap();
            let numbers: Vec<f64> = (0..count).step_by(step).map(|number| number as f64).collect();
            assert_eq!(numbers.len(), expected);
            assert!(found == numbers, "{count}");
        }
    }
}
