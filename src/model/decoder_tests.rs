//! What fixtures of a few tokens do not reach: long texts, and Gemma's factor at its real width.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::{Continuation, ContinuationKind, Example, Pass, Place, Site, TokenKind, Tokens};

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

/// Rows of prompts and continuations that begin with the same nine tokens, against the same rows each by itself: final states, tapped
/// ones and the gradient of the adapter, in float64; of one kind of attention each.
#[test]
fn what_rows_share_is_computed_once_and_the_same() {
    let model = |more: &Value| {
        let mut json = json!({
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let mut model = Decoder::random(json, 0.3, 0, Kind::Double, Device::Cpu).unwrap();
        let lora = LoraConfig { rank: 2, dropout: 0.1, ..LoraConfig::default() };
        model.add_lora(&lora, 0).unwrap();
        tch::no_grad(|| {
            for parameter in model.parameters() {
                let _ = parameter.tensor.shallow_clone().uniform_(-0.5, 0.5);
            }
        });
        model
    };
    let row = |id: &str, own: &[i64], continuations: &[&[i64]]| {
        let prompt = [&(1..10).collect::<Vec<i64>>(), own].concat();
        let kinds = [ContinuationKind::Harmful, ContinuationKind::Safe];
        let continuation = |(kind, ids): (ContinuationKind, &&[i64])| Continuation {
            kind,
            tokens: Tokens::of_kind(ids.to_vec(), TokenKind::Target),
        };
        let continuations = kinds.into_iter().zip(continuations).map(continuation).collect();
        Example::new(id, Tokens::of_kind(prompt, TokenKind::User), continuations).unwrap()
    };
    let rows = vec![
        row("a", &[20, 21, 22, 23, 24, 25], &[&[30, 31], &[32, 33, 34]]),
        row("b", &[26], &[&[35]]),
        row("c", &[27, 28], &[&[30, 36, 37, 38], &[39]]),
    ];
    let batch = Batch::new(rows, Device::Cpu).unwrap();
    let factors = [1.0, 2.0];
    let phi3 = |switch: usize| {
        json!({
            "model_type": "phi3", "original_max_position_embeddings": switch,
            "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": [2.0, 4.0]}
        })
    };
    let gemma = json!({"model_type": "gemma", "head_dim": 6, "num_key_value_heads": 1});
    for (more, taps) in [
        (json!({"model_type": "mistral", "sliding_window": null}), &[][..]),
        (json!({"model_type": "mistral", "sliding_window": 5}), &[0, 2]),
        (gemma, &[1]),
        (phi3(32), &[1]),
    ] {
        let model = model(&more);
        let found = |shared: bool, last: Last| {
            let pass = Pass { taps, last, ..Pass::default() };
            let input = if shared {
                Input::of_batch(&model, &batch, None, pass).unwrap()
            } else {
                Input::of_embeddings(model.embed(batch.ids()).unwrap(), batch.layout(), pass).unwrap()
            };
            assert_eq!(model.shared(&input).is_some(), shared);
            let hidden = model.hidden(&input).unwrap();
            let targets = batch.targets(ContinuationKind::Safe).unwrap();
            let mut states = vec![hidden.predicting(&targets).unwrap()];
            states.extend(hidden.tapped);
            if hidden.last_of.is_none() {
                states.push(hidden.last);
            }
            let sum = states.iter().map(|one| one.sin().sum(Kind::Double)).reduce(|sum, one| sum + one).unwrap();
            let parameters: Vec<Tensor> = model.parameters().into_iter().map(|parameter| parameter.tensor).collect();
            let gradients = Tensor::run_backward(&[sum], &parameters, false, false);
            states.into_iter().chain(gradients).collect::<Vec<_>>()
        };
        for last in [Last::All, Last::Predictors] {
            let (found, expected) = (found(true, last), found(false, last));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.size(), expected.size());
                let [error, most] = [found - expected, expected.copy()].map(|one| one.abs().max().double_value(&[]));
                assert!(most > 1e-3 && error < 1e-11 * most, "{error} of {most}");
            }
        }
        // Dropout would be drawn once for all rows.
        let dropped = Pass { dropout: true, ..Pass::default() };
        assert!(model.shared(&Input::of_batch(&model, &batch, None, dropped).unwrap()).is_none());
    }
    // Rotary factors of the nine tokens alone would be those of short texts, and some rows are longer ones.
    let switching = model(&phi3(12));
    assert!(switching.shared(&Input::of_batch(&switching, &batch, None, Pass::default()).unwrap()).is_none());
}

/// A prompt that is nothing but what the others begin with keeps its last token, and perturbed rows share nothing.
#[test]
fn rows_share_less_than_a_prompt_and_nothing_that_is_perturbed() {
    let json = json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1
    });
    let model = Decoder::random(json, 0.1, 0, Kind::Float, Device::Cpu).unwrap();
    let row = |id: &str, tokens: i64| {
        Example::new(id, Tokens::of_kind((0..tokens).collect(), TokenKind::User), Vec::new()).unwrap()
    };
    let batch = Batch::new(vec![row("a", 12), row("b", 9), row("c", 20)], Device::Cpu).unwrap();
    let shared = |perturbation: Option<&Perturbation>| {
        Input::of_batch(&model, &batch, perturbation, Pass::default()).unwrap().shared()
    };
    assert_eq!(shared(None), 8);
    let places = vec![Place { row: 0, offset: 3 }];
    let values = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
    let perturbation = Perturbation::new(places, vec![(Site::Embeddings, values)]).unwrap();
    assert_eq!(shared(Some(&perturbation)), 0);
}
