//! advtrain
mod attack;
mod config;
#[cfg(libtorch_cuda)]
mod cuda_link;
mod data;
mod error;
mod eval;
mod files;
mod loss;
mod model;
mod tensor;
mod train;

pub use attack::*;
pub use config::{Algorithm, DataSettings, LossConfig, ModelPreset, ModelSettings, Preset, RunConfig};
pub use data::*;
pub use error::{Error, ErrorKind, Result};
pub use eval::*;
pub use loss::*;
pub use model::*;
pub use ndarray;
pub use tch;
pub use train::*;
