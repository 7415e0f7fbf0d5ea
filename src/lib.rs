//! advtrain
mod attack;
#[cfg(libtorch_cuda)]
mod cuda_link;
mod data;
mod error;
mod files;
mod loss;
mod model;
mod tensor;
mod train;

pub use attack::*;
pub use data::*;
pub use error::{Error, ErrorKind, Result};
pub use loss::*;
pub use model::*;
pub use ndarray;
pub use tch;
pub use train::*;
