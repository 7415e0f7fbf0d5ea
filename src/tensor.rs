//! The few tensor operations that tch lacks, or has only in a panicking form.

use tch::{Kind, Tensor};

use crate::Result;

/// A copy with storage of its own, outside any graph.
pub(crate) fn snapshot(tensor: &Tensor) -> Result<Tensor> {
    let source = tensor.f_detach()?;
    let mut copy = source.f_empty_like()?;
    copy.f_copy_(&source)?;
    Ok(copy)
}

/// The only number of a tensor.
pub(crate) fn number(tensor: &Tensor) -> Result<f64> {
    Ok(f64::try_from(tensor.f_detach()?.f_to_kind(Kind::Double)?)?)
}

/// The numbers of a tensor of any shape, in order.
pub(crate) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = tensor.f_detach()?.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?.f_reshape([-1])?;
    Ok(Vec::try_from(flat)?)
}

/// A list of whole numbers as an int64 tensor on a device.
pub(crate) fn index(values: &[i64], device: tch::Device) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_to_device(device)?)
}

/// Whether an operation on this tensor would be recorded: false under a no-grad guard even where the tensor itself
/// requires a gradient.
pub(crate) fn is_recorded(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.f_alias()?.requires_grad())
}
