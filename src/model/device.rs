//! Which device, and which dtype on it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{Error, ErrorKind, Result};

/// The dtype that a model computes in. Perturbations, losses, adapters and the optimiser's state are float32 whatever it is
/// (float64 with [`Dtype::Float64`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16 on CUDA and float32 on a CPU; decided by the device alone.
    #[default]
    Auto,
    /// float32.
    Float32,
    /// bfloat16. Slow on processors without a unit for it.
    Bfloat16,
    /// float16, for inference; training in it is refused, since it would need loss scaling.
    Float16,
    /// float64, for tests.
    Float64,
}

impl Dtype {
    /// The setting that stands for a floating dtype, whatever the device.
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::BFloat16 => Self::Bfloat16,
            Kind::Half => Self::Float16,
            Kind::Double => Self::Float64,
            _ => Self::Float32,
        }
    }

    /// The dtype on a device; [`Dtype::Auto`] is decided here. Warns in the log where bfloat16 was asked for and is slow.
    pub fn on(self, device: Device) -> Kind {
        match self {
            Self::Auto if device.is_cuda() => Kind::BFloat16,
            Self::Auto | Self::Float32 => Kind::Float,
            Self::Bfloat16 => {
                if device == Device::Cpu && !has_bfloat16_unit() {
                    tracing::warn!("bfloat16 on a processor without a bfloat16 unit is far slower than float32");
                }
                Kind::BFloat16
            }
            Self::Float16 => Kind::Half,
            Self::Float64 => Kind::Double,
        }
    }
}

/// Whether this machine's processor multiplies bfloat16 itself, and libtorch knows how to have it do so.
pub fn has_bfloat16_unit() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    found
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            "float16" => Ok(Self::Float16),
            "float64" => Ok(Self::Float64),
            _ => Err(Error::setting("dtype", format!("{text:?}"), "auto, float32, bfloat16, float16 or float64")),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
            Self::Float64 => "float64",
        })
    }
}

/// The device of that name: `cpu`, `cuda`, `cuda:1`, or `auto` (CUDA where there is one).
///
/// # Errors
/// If the name is not one of these, or there is no such device: the message tells a missing GPU from a libtorch without
/// CUDA.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" if tch::utils::has_cuda() => Ok(Device::Cuda(0)),
        "auto" => Ok(Device::Cpu),
        "cuda" => cuda(name, 0),
        _ => match name.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
            Some(number) => cuda(name, number),
            None => Err(Error::setting("device", format!("{name:?}"), "auto, cpu, cuda or cuda:N")),
        },
    }
}

fn cuda(name: &str, number: usize) -> Result<Device> {
    let count = tch::Cuda::device_count().max(0) as usize;
    if number < count {
        return Ok(Device::Cuda(number));
    }
    let reason = if !tch::utils::has_cudart() {
        "libtorch_cuda is not linked: this libtorch is a CPU build".to_string()
    } else if count == 0 {
        "no CUDA device was found on this machine".to_string()
    } else {
        format!("this machine has {count} CUDA devices, numbered from 0")
    };
    Err(ErrorKind::Device { requested: name.to_string(), reason }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = device("cuda:99").unwrap_err().to_string();
        assert!(error.starts_with("device cuda:99: "), "{error}");
        assert!(device("tpu").unwrap_err().to_string().contains("\"tpu\""));
    }

    #[test]
    fn auto_is_decided_by_the_device_alone() {
        assert_eq!([Device::Cpu, Device::Cuda(1)].map(|device| Dtype::Auto.on(device)), [Kind::Float, Kind::BFloat16]);
        assert_eq!([Kind::Float, Kind::BFloat16].map(Dtype::of), [Dtype::Float32, Dtype::Bfloat16]);
    }

    #[test]
    #[cfg(libtorch_cuda)]
    fn libtorch_cuda_stays_linked() {
        assert!(tch::utils::has_cudart());
    }
}
