//! What fixtures of a few tokens do not reach: long texts, and Gemma's factor at its real width.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::Pass;

#[test]
fn a_text_beyond_the_models_positions_is_said_once() {
    let json = json!({
        "model_type": "llama", "vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 6
    });
    let model = Decoder::random(json, 0.1, 0, Kind::Float, Device::Cpu).unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let writer = Arc::new(log.reopen().unwrap());
    let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
    let warnings = |lengths: &[usize]| {
        let layout = Layout::of_lengths(lengths);
        let embeddings = Tensor::zeros([layout.tokens() as i64, 4], (Kind::Float, Device::Cpu));
        model.hidden(&Input::of_embeddings(embeddings, &layout, Pass::default()).unwrap()).unwrap();
        files::read_text(log.path()).unwrap().matches("tokens=7 max_positions=6").count()
    };
    tracing::subscriber::with_default(subscriber, || {
        assert_eq!([warnings(&[6, 6]), warnings(&[2, 7]), warnings(&[7])], [0, 1, 1]);
    });
}

/// sqrt(2048) is 45.2548 and sqrt(3072) is 55.4256; bfloat16 has 45.25 and 55.5.
#[test]
fn gemmas_factor_is_rounded_before_it_multiplies() {
    for (hidden, factor) in [(2048, 45.25), (3072, 55.5)] {
        let json = json!({
            "model_type": "gemma", "vocab_size": 2, "hidden_size": hidden, "intermediate_size": 1,
            "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2
        });
        let model = Decoder::random(json, 0.1, 0, Kind::BFloat16, Device::Cpu).unwrap();
        // Every bfloat16 from 1 to 2; products of two of them are exact in float32.
        let x = Tensor::arange(128, (Kind::Float, Device::Cpu)) / 128.0 + 1.0;
        let times = |factor: f64| (&x * factor).to_kind(Kind::BFloat16);
        let found = model.enter(&x).unwrap();
        assert!(found.equal(&times(factor)), "{hidden}");
        assert!(!found.equal(&times((hidden as f64).sqrt())), "{hidden}: rounding makes no difference");
    }
}
