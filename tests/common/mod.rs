//! Shared by the tests: fixtures, and comparing tensors.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::{collections::HashMap, path::PathBuf};

use advtrain::tch::{Kind, Tensor};

/// A file or folder of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The tensors of a safetensors file.
pub fn read(path: PathBuf) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_iter().collect()
}

/// The largest difference, relative to the largest number of `expected`.
pub fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let difference = (found - &expected).abs().max();
    difference.double_value(&[]) / expected.abs().max().double_value(&[]).max(1e-300)
}

/// Fails unless the two agree to `tolerance`, relative to the largest expected number.
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let distance = distance(found, expected);
    assert!(distance <= tolerance, "{what}: differs by {distance:.2e}, more than {tolerance:.0e}");
}
