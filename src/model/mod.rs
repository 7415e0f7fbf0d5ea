//! One decoder, its adapters, and what attacks and losses see of it.

mod array;
mod attention;
mod behind;
mod block;
mod cache;
mod causal_lm;
mod config;
mod decoder;
mod device;
mod earlier;
mod export;
mod fingerprint;
mod generate;
mod head;
mod hf_config;
mod linear;
mod lora;
mod mlp;
mod norm;
mod perturbation;
mod plan;
mod product;
mod rope;
mod shared;
mod weights;

pub use array::{to_array, to_tensor};
pub use causal_lm::{Adapter, Addition, CausalLm, Hidden, Input, Last, Parameter, Pass, TrainableLm};
pub use config::{Activation, DecoderConfig, Family, NormKind, Projection, RopeConfig, RopeScaling};
pub use decoder::Decoder;
pub use device::{Dtype, device, has_bfloat16_unit};
pub use generate::{Generation, Sampling};
pub use lora::LoraConfig;
pub use perturbation::{Perturbation, Place, Site};
pub(crate) use weights::{read_tensors, write_tensors};
