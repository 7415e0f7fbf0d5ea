//! The border to ndarray: numbers for analysis, without libtorch.

use ndarray::{ArrayD, IxDyn};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// A tensor of any shape and dtype as a float64 array of the same shape.
///
/// # Errors
/// If libtorch cannot copy it.
pub fn to_array(tensor: &Tensor) -> Result<ArrayD<f64>> {
    let shape: Vec<usize> = tensor.size().iter().map(|len| *len as usize).collect();
    let flat = tensor.f_detach()?.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?.f_reshape([-1])?;
    ArrayD::from_shape_vec(IxDyn(&shape), Vec::<f64>::try_from(flat)?)
        .map_err(|error| Error::mismatch("array of a tensor", format!("{shape:?}"), error))
}

/// An array as a float64 tensor of the same shape.
///
/// # Errors
/// If libtorch refuses the shape.
pub fn to_tensor(array: &ArrayD<f64>) -> Result<Tensor> {
    let shape: Vec<i64> = array.shape().iter().map(|len| *len as i64).collect();
    let flat: Vec<f64> = array.iter().copied().collect();
    Ok(Tensor::f_from_slice(&flat)?.f_view(shape.as_slice())?)
}
