//! advtrain
#[cfg(libtorch_cuda)]
mod cuda_link;
mod data;
mod error;
pub use data::*;
pub use error::{Error, ErrorKind, Result};
pub use tch;
