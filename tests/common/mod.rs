//! Shared by the tests: fixtures, and comparing tensors.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::{collections::HashMap, path::PathBuf};

use advtrain::{
    CausalLm, Decoder, Hidden, Input, Result,
    tch::{Device, Kind, Tensor},
};

/// The folders of tests/fixtures/models.
pub const MODELS: [&str; 13] = [
    "gemma-mqa",
    "gemma-mha",
    "phi3",
    "phi3-longrope",
    "phi3-partial",
    "mistral",
    "mistral-nowindow",
    "mistral-sharded",
    "llama",
    "llama3",
    "llama-linear",
    "qwen2",
    "qwen2-untied",
];

/// A file or folder of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A model of tests/fixtures/models.
pub fn load(name: &str, kind: Kind) -> Decoder {
    Decoder::load(fixture("models").join(name), kind, Device::Cpu).unwrap()
}

/// `count` ids of the fixtures' vocabulary, the same for the same seed.
pub fn some_ids(seed: u64, count: usize) -> Vec<i64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (3 + (state >> 33) % 93) as i64
    };
    (0..count).map(|_| next()).collect()
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

/// A decoder that has only what the trait demands, so that it has no cache.
pub struct NoCache<'a>(pub &'a Decoder);

impl CausalLm for NoCache<'_> {
    fn layers(&self) -> usize {
        self.0.layers()
    }
    fn kind(&self) -> Kind {
        self.0.kind()
    }
    fn embedding(&self) -> &Tensor {
        self.0.embedding()
    }
    fn hidden(&self, input: &Input) -> Result<Hidden> {
        self.0.hidden(input)
    }
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.0.logits(hidden)
    }
}
