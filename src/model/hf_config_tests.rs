//! What is refused, and how null, dialects and lists of layers are read.

use serde_json::json;

use super::*;

fn tiny() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4
    })
}

fn with(key: &str, value: Value) -> Result<DecoderConfig> {
    let mut json = tiny();
    json[key] = value;
    DecoderConfig::from_json(&json, "config.json")
}

#[test]
fn what_is_not_supported_is_named() {
    for (key, value, in_message) in [
        ("model_type", json!("gpt2"), "model_type = \"gpt2\" is not supported"),
        ("quantization_config", json!({"load_in_4bit": true}), "quantization_config"),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "rope_scaling.type = \"dynamic\""),
        ("rope_parameters", json!({"rope_type": "yarn"}), "rope_parameters.rope_type = \"yarn\""),
        ("hidden_act", json!("relu"), "hidden_act = \"relu\""),
        ("attention_dropout", json!(0.1), "attention_dropout = 0.1"),
        ("num_key_value_heads", json!(3), "num_key_value_heads: expected a divisor"),
        ("hidden_size", json!("32"), "hidden_size: expected a whole number from 1 to 2147483647, found \"32\""),
        ("rope_scaling", json!({"type": "linear"}), "rope_scaling.factor: expected a number above 0, found nothing"),
        ("use_bidirectional_attention", json!(true), "use_bidirectional_attention = true is not supported: false is"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types = [\"full_attention\","),
    ] {
        let error = with(key, value).unwrap_err().to_string();
        assert!(error.contains(in_message), "{error}");
        assert!(error.starts_with("config.json: "), "{error}");
    }
}

#[test]
fn numbers_out_of_range_are_named() {
    let long = |key: &str, value: Value| {
        let mut rope = json!({
            "type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.0, 1.0, 1.0],
            "original_max_position_embeddings": 8
        });
        rope[key] = value;
        let mut json = tiny();
        json["max_position_embeddings"] = json!(16);
        json["rope_scaling"] = rope;
        json
    };
    let llama3 = |key: &str, value: Value| {
        let mut rope = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64
        });
        rope[key] = value;
        let mut json = tiny();
        json["rope_parameters"] = rope;
        json
    };
    let plain = |key: &str, value: Value| {
        let mut json = tiny();
        json[key] = value;
        json
    };
    let phi3 = |key: &str, value: Value| {
        let mut json = plain(key, value);
        json["model_type"] = json!("phi3");
        json
    };
    let changed = |change: &[(&str, i64)]| {
        let mut json = tiny();
        change.iter().for_each(|(key, value)| json[*key] = json!(value));
        json
    };
    for (json, message) in [
        (plain("rope_theta", json!(0)), "rope_theta: expected a number above 0, found 0"),
        (plain("rms_norm_eps", json!(-1e-6)), "rms_norm_eps: expected a number above 0, found -1e-6"),
        (plain("partial_rotary_factor", json!(-0.5)), "partial_rotary_factor: expected a number above 0, found -0.5"),
        (plain("partial_rotary_factor", json!(0.5)), "partial_rotary_factor = 0.5 is not supported: 1.0 is, but for"),
        (phi3("partial_rotary_factor", json!(2.0)), "partial_rotary_factor: rotates 16 of 8 numbers of a head"),
        (
            plain("num_hidden_layers", json!(1u64 << 31)),
            "num_hidden_layers: expected a whole number from 1 to 2147483647",
        ),
        (plain("num_attention_heads", json!(64)), "num_attention_heads: expected at most hidden_size = 32, found 64"),
        (llama3("factor", json!(0.0)), "rope_parameters.factor: expected a number above 0, found 0.0"),
        (
            llama3("high_freq_factor", json!(1.0)),
            "rope_parameters.high_freq_factor: expected a number above low_freq_factor = 1",
        ),
        (
            llama3("original_max_position_embeddings", json!(0)),
            "rope_parameters.original_max_position_embeddings: expected",
        ),
        (
            long("short_factor", json!([1.0, 0.0, 1.0, 1.0])),
            "rope_scaling.short_factor: expected a list of numbers above 0",
        ),
        (long("attention_factor", json!(0)), "rope_scaling.attention_factor: expected a number above 0, found 0"),
        (
            long("original_max_position_embeddings", json!(1)),
            "original_max_position_embeddings = 1: expected at least 2",
        ),
        (
            changed(&[("vocab_size", 1 << 30), ("hidden_size", 1 << 11)]),
            "vocab_size * hidden_size = 2199023255552: expected at most 1099511627776",
        ),
        (
            changed(&[("hidden_size", (1 << 31) - 1), ("intermediate_size", (1 << 31) - 1)]),
            "2 * intermediate_size * hidden_size = 9223372028264841218: expected at most 1099511627776",
        ),
        (
            changed(&[
                ("head_dim", (1 << 31) - 1),
                ("num_attention_heads", (1 << 31) - 1),
                ("hidden_size", (1 << 31) - 1),
                ("vocab_size", 1),
            ]),
            "(num_attention_heads + 2 * num_key_value_heads) * head_dim * hidden_size = ",
        ),
    ] {
        let error = DecoderConfig::from_json(&json, "config.json").unwrap_err().to_string();
        assert!(error.starts_with(&format!("config.json: {message}")), "{error:?} is not {message:?}");
    }
    // What was changed above is read as it was.
    DecoderConfig::from_json(&long("attention_factor", json!(1.0)), "config.json").unwrap();
    DecoderConfig::from_json(&llama3("factor", json!(8.0)), "config.json").unwrap();
}

#[test]
fn two_dialects_in_one_file_must_agree() {
    let with_both = |old: Value| {
        let mut json = tiny();
        json["rope_parameters"] = json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0});
        json["rope_theta"] = json!(5e5);
        json["rope_scaling"] = old;
        DecoderConfig::from_json(&json, "config.json")
    };
    for agrees in [Value::Null, json!({"type": "linear", "factor": 2.0})] {
        assert_eq!(with_both(agrees).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }
    let error = with_both(json!({"type": "linear", "factor": 4.0})).unwrap_err().to_string();
    assert!(error.contains("rope_parameters and rope_scaling say different things"), "{error}");
    let error = with_both(json!({"type": "yarn", "factor": 4.0})).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.type = \"yarn\""), "{error}");
}

/// As transformers' Phi-3 has it: 4096 where the file does not say.
#[test]
fn the_switch_of_long_rope_has_a_default() {
    let mut json = tiny();
    json["model_type"] = json!("phi3");
    json["max_position_embeddings"] = json!(131_072);
    json["rope_scaling"] =
        json!({"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 3.0, 4.0]});
    let scaling = |json: &Value| DecoderConfig::from_json(json, "config.json").map(|config| config.rope.scaling);
    let RopeScaling::Long { original, attention_factor, .. } = scaling(&json).unwrap() else { panic!("long") };
    assert_eq!(original, 4096);
    assert!((attention_factor - (1.0 + 32f64.ln() / 4096f64.ln()).sqrt()).abs() < 1e-12);
    json["rope_scaling"]["factor"] = json!(32.0);
    assert!(scaling(&json).is_ok());
    json["rope_scaling"]["factor"] = json!(4.0);
    let error = scaling(&json).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.factor = 4.0 is not supported: 32 is"), "{error}");
    json["rope_scaling"]["factor"] = Value::Null;
    json["rope_scaling"]["attention_factor"] = json!(2.0);
    let error = scaling(&json).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.attention_factor = 2.0 is not supported: 1.19"), "{error}");
}

/// transformers 5 takes what stands outside, or for Phi-3 its default; transformers 4 looks there alone.
#[test]
fn a_switch_of_long_rope_that_readers_differ_on_is_refused() {
    for (family, outer, within, found) in [
        ("phi3", json!(8192), json!(8192), Ok(8192)),
        ("phi3", json!(8192), Value::Null, Ok(8192)),
        ("phi3", Value::Null, json!(4096), Ok(4096)),
        ("phi3", Value::Null, json!(8192), Err("the 4096 beside it is")),
        ("phi3", json!(4096), json!(8192), Err("the 4096 beside it is")),
        ("llama", Value::Null, json!(8192), Ok(8192)),
        ("llama", json!(4096), json!(8192), Err("the 4096 beside it is")),
    ] {
        let mut json = tiny();
        json["model_type"] = json!(family);
        json["max_position_embeddings"] = json!(131_072);
        json["original_max_position_embeddings"] = outer;
        json["rope_scaling"] = json!({
            "type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": within
        });
        let read = DecoderConfig::from_json(&json, "config.json").map(|config| config.rope.scaling);
        match (read, found) {
            (Ok(RopeScaling::Long { original, .. }), Ok(expected)) => assert_eq!(original, expected, "{json}"),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (read, _) => panic!("{json}: {read:?}"),
        }
    }
}

#[test]
fn gemma_is_computed_with_the_tanh_form_whatever_it_is_called() {
    for (key, name, right) in [
        ("hidden_act", "gelu", true),
        ("hidden_act", "gelu_pytorch_tanh", true),
        ("hidden_activation", "gelu", true),
        ("hidden_activation", "silu", false),
    ] {
        let mut json = tiny();
        json["model_type"] = json!("gemma");
        json["head_dim"] = json!(8);
        json[key] = json!(name);
        match DecoderConfig::from_json(&json, "config.json") {
            Ok(config) => assert!(right && config.activation == Activation::GeluTanh, "{json}"),
            Err(error) => assert!(!right && error.to_string().contains(key), "{error}"),
        }
    }
}

/// transformers 5 writes the list for Qwen2; what it says for the others must be what `sliding_window` says.
#[test]
fn layer_types_agree_with_the_window() {
    for (family, window, types, fits) in [
        ("qwen2", json!(null), ["full_attention", "full_attention"], true),
        ("qwen2", json!(null), ["full_attention", "sliding_attention"], false),
        ("mistral", json!(4), ["sliding_attention", "sliding_attention"], true),
        ("mistral", json!(4), ["full_attention", "sliding_attention"], false),
        ("mistral", json!(null), ["sliding_attention", "sliding_attention"], false),
        ("phi3", json!(null), ["chunked_attention", "chunked_attention"], false),
    ] {
        let mut json = tiny();
        json["model_type"] = json!(family);
        json["sliding_window"] = window.clone();
        json["layer_types"] = json!(types);
        let found = DecoderConfig::from_json(&json, "config.json");
        assert_eq!(found.is_ok(), fits, "{family}, {window}, {types:?}: {found:?}");
    }
    assert!(with("layer_types", json!("full_attention")).is_err());
}

#[test]
fn null_counts_as_absent() {
    let config = with("rope_scaling", Value::Null).unwrap();
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert_eq!(with("head_dim", Value::Null).unwrap().head_dim, 8);
}
