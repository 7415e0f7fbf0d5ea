//! Shared by the tests of evaluation: a random model with a tokenizer and a chat template.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::path::PathBuf;

use advtrain::{
    ChatFormat, Decoder,
    tch::{Device, Kind},
};

/// A byte-level tokenizer with its template.
pub fn format() -> ChatFormat {
    ChatFormat::load(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer")).unwrap()
}

/// A random model of two blocks that has read nothing: what it says is noise, the same at every call.
pub fn model() -> Decoder {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": format().tokenizer().vocabulary_size(), "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": true
    });
    Decoder::random(json, 0.4, 1, Kind::Float, Device::Cpu).unwrap()
}
