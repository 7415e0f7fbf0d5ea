//! LoRA adapters against PEFT: tests/fixtures/make_adapters.py wrote the adapters and the expected numbers.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use advtrain::{
    Adapter, CausalLm, Decoder, Input, Layout, LoraConfig, Parameter, Pass, TrainableLm,
    tch::{self, Device, Kind, Tensor},
};
use common::{assert_close, distance, fixture, load, read, some_ids};
use serde_json::{Value, json};

/// Each adapter and its model.
const ADAPTERS: [(&str, &str); 4] =
    [("llama", "llama"), ("phi3", "phi3"), ("gemma-mqa", "gemma-mqa"), ("llama-rslora", "llama")];

fn folder(adapter: &str) -> PathBuf {
    fixture("adapters").join(adapter)
}

fn with_adapter(adapter: &str, model: &str, kind: Kind) -> Decoder {
    let mut model = load(model, kind);
    model.load_lora(folder(adapter)).unwrap();
    model
}

/// Two rows of text.
fn layout() -> Layout {
    Layout::of_lengths(&[9, 6])
}

/// The logits of two rows of text.
fn logits(model: &dyn CausalLm, pass: Pass) -> Tensor {
    let layout = layout();
    let embeddings = model.embed(&Tensor::from_slice(&some_ids(77, layout.tokens()))).unwrap();
    let input = Input::of_embeddings(embeddings, &layout, pass).unwrap();
    model.logits(&model.hidden(&input).unwrap().last).unwrap()
}

fn assert_equal(what: &str, found: &Tensor, expected: &Tensor) {
    assert!(found.equal(expected), "{what}: differs by {:e}", distance(found, expected));
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn logits_and_gradients_equal_pefts() {
    for (adapter, model) in ADAPTERS {
        let model = with_adapter(adapter, model, Kind::Float);
        let expected = read(folder(adapter).join("expected.safetensors"));
        let (layout, index) = Layout::from_padded(&expected["none.mask"]).unwrap();
        let index = Tensor::from_slice(&index);
        let pack = |padded: &Tensor| padded.flatten(0, 1).index_select(0, &index);
        let ids = pack(&expected["none.ids"]);
        let input = Input::of_embeddings(model.embed(&ids).unwrap(), &layout, Pass::default()).unwrap();
        let last = model.hidden(&input).unwrap().last;
        let found = model.logits(&last).unwrap();
        assert_close(&format!("{adapter}: logits"), &found, &pack(&expected["none.logits"]), 1e-4);

        // The sum over rows of the mean, over the row's tokens from the fourth on, of -log p.
        let rows = layout.rows().iter().map(|row| {
            let targets =
                Tensor::from_slice(&(row.tokens().start as i64 + 3..row.tokens().end as i64).collect::<Vec<_>>());
            let hidden = last.index_select(0, &(&targets - 1));
            -model.log_probs(&hidden, &ids.index_select(0, &targets)).unwrap().mean(Kind::Float)
        });
        let loss = rows.reduce(|a, b| a + b).unwrap();
        let parameters = model.parameters();
        let tensors: Vec<_> = parameters.iter().map(|one| &one.tensor).collect();
        let gradients = Tensor::run_backward(&[loss], &tensors, false, false);
        let names: BTreeSet<_> = parameters.iter().map(|one| format!("grad.{}", one.name)).collect();
        let of_peft: BTreeSet<_> = expected.keys().filter(|key| key.starts_with("grad.")).cloned().collect();
        assert_eq!(names, of_peft, "{adapter}");
        for (Parameter { name, .. }, found) in parameters.iter().zip(&gradients) {
            assert_close(&format!("{adapter}: {name}"), found, &expected[&format!("grad.{name}")], 1e-4);
        }
    }
}

#[test]
fn with_the_adapter_off_the_model_is_the_original() {
    for (adapter, name) in ADAPTERS {
        let model = with_adapter(adapter, name, Kind::Float);
        let base = logits(&load(name, Kind::Float), Pass::default());
        assert_equal(adapter, &logits(&model, Pass { adapter: Adapter::Off, ..Pass::default() }), &base);
        assert!(distance(&logits(&model, Pass::default()), &base) > 1e-2, "{adapter}");
    }
}

#[test]
fn what_is_saved_is_what_peft_saved() {
    for (adapter, name) in ADAPTERS {
        let model = with_adapter(adapter, name, Kind::Float);
        let saved = tempfile::tempdir().unwrap();
        model.save_lora(saved.path(), &format!("models/{name}")).unwrap();
        let mut again = load(name, Kind::Float);
        again.load_lora(saved.path()).unwrap();
        assert_equal(adapter, &logits(&again, Pass::default()), &logits(&model, Pass::default()));

        let file = "adapter_model.safetensors";
        let (ours, pefts) = (read(saved.path().join(file)), read(folder(adapter).join(file)));
        assert_eq!(ours.keys().collect::<BTreeSet<_>>(), pefts.keys().collect::<BTreeSet<_>>());
        for (name, tensor) in &pefts {
            assert_equal(name, &ours[name], tensor);
        }

        let file = "adapter_config.json";
        let (ours, pefts) = (json_of(&saved.path().join(file)), json_of(&folder(adapter).join(file)));
        let set =
            |json: &Value| -> BTreeSet<String> { serde_json::from_value(json["target_modules"].clone()).unwrap() };
        assert_eq!(set(&ours), set(&pefts));
        for (key, value) in ours.as_object().unwrap().iter().filter(|(key, _)| *key != "target_modules") {
            let expected = pefts.get(key).unwrap_or_else(|| panic!("PEFT has no key {key}"));
            let same = value == expected || (value.is_number() && value.as_f64() == expected.as_f64());
            assert!(same, "{key}: {value}, and PEFT writes {expected}");
        }
        for key in
            ["peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora"]
        {
            assert!(ours.get(key).is_some(), "{key} is missing");
        }
    }
}

/// Half a unit in a bfloat16's last place is 2e-3 of the number: an adapter that changes weights by less is not rounded away.
#[test]
fn a_frozen_model_in_half_precision_keeps_a_small_adapter() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let model = with_adapter("llama", "llama", kind);
        let _guard = advtrain::tch::no_grad_guard();
        for mut one in model.parameters().into_iter().filter(|one| one.name.contains("lora_B")) {
            let _ = one.tensor.g_mul_scalar_(1e-3);
        }
        let off = logits(&model, Pass { adapter: Adapter::Off, ..Pass::default() });
        let on = logits(&model, Pass::default());
        let frozen = logits(model.frozen(false).unwrap().unwrap().as_ref(), Pass::default());
        assert!(frozen.equal(&on) && !frozen.equal(&off), "{kind:?}");
    }
}

#[test]
fn frozen_models_compute_the_same_and_no_gradient_arrives_anywhere() {
    for (adapter, name) in ADAPTERS {
        let model = with_adapter(adapter, name, Kind::Double);
        let expected = logits(&model, Pass::default());
        assert!(expected.requires_grad());
        for dropout in [false, true] {
            let what = format!("{adapter}, dropout {dropout}");
            let frozen = model.frozen(dropout).unwrap().unwrap();
            let found = logits(frozen.as_ref(), Pass::default());
            assert!(!found.requires_grad(), "{what}");
            assert_close(&what, &found, &expected, 1e-12);

            // A backward pass as an attack makes it: to the embeddings, and nowhere else.
            let layout = layout();
            let ids = Tensor::from_slice(&some_ids(77, layout.tokens()));
            let embeddings = frozen.embed(&ids).unwrap().set_requires_grad(true);
            let input = Input::of_embeddings(embeddings.shallow_clone(), &layout, Pass::default()).unwrap();
            let log_probs = frozen.log_probs(&frozen.hidden(&input).unwrap().last, &ids).unwrap();
            log_probs.sum(Kind::Double).backward();
            assert!(embeddings.grad().defined() && f64::try_from(embeddings.grad().abs().max()).unwrap() > 0.0);
            assert!(!frozen.embedding().requires_grad());
            for Parameter { name, tensor } in model.parameters() {
                assert!(!tensor.grad().defined(), "{what}: {name}");
            }
        }
        // The model itself is trained as before.
        logits(&model, Pass::default()).sum(Kind::Double).backward();
        assert!(model.parameters().iter().all(|one| one.tensor.grad().defined()));
    }
}

#[test]
fn frozen_models_still_know_the_original() {
    let off = Pass { adapter: Adapter::Off, ..Pass::default() };
    for (adapter, name) in ADAPTERS {
        let model = with_adapter(adapter, name, Kind::Double);
        let original = logits(&load(name, Kind::Double), Pass::default());
        for dropout in [false, true] {
            let what = format!("{adapter}, dropout {dropout}");
            let frozen = model.frozen(dropout).unwrap().unwrap();
            let again = frozen.frozen(false).unwrap().unwrap();
            for frozen in [&frozen, &again] {
                assert_equal(&what, &logits(frozen.as_ref(), off), &original);
                assert!(distance(&logits(frozen.as_ref(), Pass::default()), &original) > 1e-3, "{what}");
            }
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_yet_and_is_what_is_trained() {
    for (name, expected) in [("phi3", 16), ("llama3", 28), ("gemma-mha", 28)] {
        let base = logits(&load(name, Kind::Float), Pass::default());
        let config = LoraConfig { rank: 3, ..LoraConfig::default() };
        let with_seed = |seed| {
            let mut model = load(name, Kind::Float);
            model.add_lora(&config, seed).unwrap();
            model
        };
        let model = with_seed(4);
        let found = logits(&model, Pass::default());
        assert_equal(name, &found, &base);
        let parameters = model.parameters();
        assert_eq!(parameters.len(), expected, "{name}");
        found.square().sum(Kind::Float).backward();
        let numbers = |of: &Tensor| f64::try_from(of.abs().max()).unwrap();
        let other = with_seed(5).parameters();
        for ((one, same), other) in parameters.iter().zip(with_seed(4).parameters()).zip(other) {
            assert_equal(&one.name, &one.tensor, &same.tensor);
            let gradient = numbers(&one.tensor.grad());
            if one.name.contains("lora_A") {
                let bound = 1.0 / (one.tensor.size()[1] as f64).sqrt();
                let largest = numbers(&one.tensor);
                assert!(largest <= bound + 1e-6 && largest > 0.8 * bound, "{}: {largest}", one.name);
                assert!(!one.tensor.equal(&other.tensor), "{}", one.name);
                assert_eq!(gradient, 0.0, "{}", one.name);
            } else {
                assert_eq!(numbers(&one.tensor), 0.0, "{}", one.name);
                assert!(gradient > 0.0, "{}", one.name);
            }
        }
        assert!(!model.embedding().requires_grad());
    }
}

#[test]
fn dropout_is_active_only_when_asked_for() {
    let model = with_adapter("llama", "llama", Kind::Float);
    let quiet = logits(&model, Pass::default());
    assert_equal("without", &logits(&model, Pass::default()), &quiet);
    let noisy = Pass { dropout: true, ..Pass::default() };
    assert!(distance(&logits(&model, noisy), &quiet) > 1e-3);
    assert!(distance(&logits(model.frozen(true).unwrap().unwrap().as_ref(), noisy), &quiet) > 1e-3);
    // Where the adapter is merged or off there is nothing to drop.
    let merged = model.frozen(false).unwrap().unwrap();
    assert_equal("merged", &logits(merged.as_ref(), noisy), &logits(merged.as_ref(), Pass::default()));
    let off = |dropout| logits(&model, Pass { adapter: Adapter::Off, dropout, ..Pass::default() });
    assert_equal("off", &off(true), &off(false));

    let mut none = load("llama", Kind::Float);
    let config = LoraConfig { rank: 4, dropout: 0.0, ..LoraConfig::default() };
    none.add_lora(&config, 1).unwrap();
    let _guard = tch::no_grad_guard();
    for Parameter { mut tensor, .. } in none.parameters() {
        let _ = tensor.fill_(0.05);
    }
    assert_equal("of rate 0", &logits(&none, noisy), &logits(&none, Pass::default()));
}

/// The rule is PEFT's: the whole name, or the parts at its end.
#[test]
fn target_modules_are_whole_names_or_their_last_parts() {
    let layers = |targets: &[&str]| -> Vec<String> {
        let mut model = load("llama", Kind::Float);
        let target_modules = targets.iter().map(|name| name.to_string()).collect();
        model.add_lora(&LoraConfig { rank: 2, target_modules, ..LoraConfig::default() }, 1).unwrap();
        let saved = tempfile::tempdir().unwrap();
        model.save_lora(saved.path(), "llama").unwrap();
        assert_eq!(json_of(&saved.path().join("adapter_config.json"))["target_modules"], json!(targets));
        let mut again = load("llama", Kind::Float);
        again.load_lora(saved.path()).unwrap();
        let names = |model: &Decoder| -> Vec<String> {
            let factors = model.parameters().into_iter().filter(|one| one.name.ends_with("lora_A.weight"));
            let module = |name: &str| name.replace("base_model.model.model.layers.", "").replace(".lora_A.weight", "");
            factors.map(|one| module(&one.name)).collect()
        };
        assert_eq!(names(&again), names(&model));
        names(&model)
    };
    assert_eq!(layers(&["model.layers.1.self_attn.v_proj"]), ["1.self_attn.v_proj"]);
    assert_eq!(layers(&["0.mlp.up_proj", "q_proj"]), ["0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.q_proj"]);
    let mut model = load("llama", Kind::Float);
    for unknown in ["proj", "_proj", "layers.0", "lm_head", ""] {
        let config = LoraConfig { target_modules: vec![unknown.to_string()], ..LoraConfig::default() };
        let error = model.add_lora(&config, 1).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("lora.target_modules = {unknown:?}: must be one of [\"down_proj\"")),
            "{error}"
        );
    }
}

/// A copy of the llama adapter, changed.
fn changed(config: impl FnOnce(&mut Value), tensors: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut json = json_of(&folder("llama").join("adapter_config.json"));
    config(&mut json);
    fs::write(copy.path().join("adapter_config.json"), json.to_string()).unwrap();
    let mut all: BTreeMap<String, Tensor> =
        read(folder("llama").join("adapter_model.safetensors")).into_iter().collect();
    tensors(&mut all);
    let all: Vec<_> = all.iter().collect();
    Tensor::write_safetensors(&all, copy.path().join("adapter_model.safetensors")).unwrap();
    copy
}

/// Loading fails with these words and leaves the model as it was.
fn assert_refused(folder: &Path, words: &[&str]) {
    let mut model = load("llama", Kind::Float);
    let error = model.load_lora(folder).unwrap_err().to_string();
    for word in words.iter().chain(&[folder.to_str().unwrap()]) {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
    assert!(model.lora().is_none() && model.parameters().is_empty());
    assert_equal("logits", &logits(&model, Pass::default()), &logits(&load("llama", Kind::Float), Pass::default()));
}

#[test]
fn bad_adapters_are_refused_by_name() {
    const FACTOR: &str = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let none = |_: &mut BTreeMap<String, Tensor>| {};
    let cases: [(&str, Value, &[&str]); 22] = [
        ("peft_type", json!("IA3"), &["peft_type = \"IA3\" is not supported"]),
        ("use_dora", json!(true), &["use_dora = true is not supported"]),
        ("bias", json!("all"), &["bias = \"all\" is not supported"]),
        ("rank_pattern", json!({"q_proj": 8}), &["rank_pattern = {\"q_proj\":8} is not supported"]),
        ("alpha_pattern", json!({"q_proj": 8}), &["alpha_pattern"]),
        ("modules_to_save", json!(["lm_head"]), &["modules_to_save"]),
        ("layers_to_transform", json!([0]), &["layers_to_transform"]),
        ("exclude_modules", json!("q_proj"), &["exclude_modules"]),
        ("kasa_config", json!({"beta": 1.0}), &["kasa_config"]),
        ("init_lora_weights", json!("pissa_niter_4"), &["init_lora_weights = \"pissa_niter_4\" is not supported"]),
        ("r", json!("four"), &["r: expected a whole number, found \"four\""]),
        ("r", json!(5), &["layers.0.self_attn.q_proj.lora_A.weight\": expected shape [5, 32], found [4, 32]"]),
        ("r", json!(0), &["lora.rank = 0: must be from 1 to 65536"]),
        ("r", json!(u64::MAX), &["lora.rank = 18446744073709551615: must be from 1 to 65536"]),
        ("lora_alpha", Value::Null, &["lora_alpha: expected a number, found null"]),
        ("lora_dropout", json!(1.0), &["lora.dropout = 1: must be at least 0 and below 1"]),
        ("target_modules", json!(["w_proj", "x_proj"]), &["target_modules: the model has none of them", "q_proj"]),
        ("target_modules", json!([]), &["target_modules: expected a list of names, not empty"]),
        (
            "target_modules",
            json!(["q_proj", "lm_head"]),
            &["target_modules = \"lm_head\" is not supported: linear layers"],
        ),
        (
            "target_modules",
            json!(["model.embed_tokens"]),
            &["target_modules = \"model.embed_tokens\" is not supported"],
        ),
        ("use_rslora", json!(1), &["use_rslora: expected true or false, found 1"]),
        ("target_modules", json!(".*q_proj"), &["target_modules: expected a list of names"]),
    ];
    for (key, value, words) in cases {
        assert_refused(changed(|json| json[key] = value, none).path(), words);
    }
    // PEFT takes a list that names modules of other families too.
    let wider = changed(|json| json["target_modules"].as_array_mut().unwrap().push(json!("w_proj")), none);
    load("llama", Kind::Float).load_lora(wider.path()).unwrap();
    // And a word for all of them.
    let all = changed(|json| json["target_modules"] = json!("all-linear"), none);
    let [named, every] = [folder("llama"), all.path().to_path_buf()].map(|folder| {
        let mut model = load("llama", Kind::Float);
        model.load_lora(folder).unwrap();
        logits(&model, Pass::default())
    });
    assert_equal("logits", &every, &named);
    let missing = changed(|_| {}, |all| assert!(all.remove(FACTOR).is_some()));
    assert_refused(missing.path(), &[FACTOR, "is missing"]);
    let extra = changed(
        |_| {},
        |all| {
            let _ = all.insert(
                "base_model.model.lm_head.lora_A.weight".into(),
                Tensor::zeros([4, 32], (Kind::Float, Device::Cpu)),
            );
        },
    );
    assert_refused(extra.path(), &["1 tensors that", "lm_head.lora_A"]);
    // Fewer targets than factors: the others would be dropped without a word.
    assert_refused(changed(|json| json["target_modules"] = json!(["q_proj"]), none).path(), &["24 tensors that"]);
    let turned = changed(
        |_| {},
        |all| {
            let factor = all.get_mut(FACTOR).unwrap();
            *factor = factor.tr().contiguous();
        },
    );
    assert_refused(turned.path(), &[FACTOR, "expected shape [48, 4], found [4, 48]"]);

    let copy = changed(|_| {}, none);
    fs::write(copy.path().join("adapter_config.json"), "{").unwrap();
    assert_refused(copy.path(), &["adapter_config.json", "not JSON"]);
    fs::remove_file(copy.path().join("adapter_config.json")).unwrap();
    assert_refused(copy.path(), &["adapter_config.json"]);
    let copy = changed(|_| {}, none);
    fs::remove_file(copy.path().join("adapter_model.safetensors")).unwrap();
    assert_refused(copy.path(), &["adapter_model.safetensors"]);
}

#[test]
fn settings_out_of_range_are_named() {
    let mut model = load("llama", Kind::Float);
    for (config, message) in [
        (LoraConfig { rank: 0, ..LoraConfig::default() }, "lora.rank = 0: must be from 1 to 65536"),
        (LoraConfig { rank: 65_537, ..LoraConfig::default() }, "lora.rank = 65537: must be from 1 to 65536"),
        (LoraConfig { alpha: f64::INFINITY, ..LoraConfig::default() }, "lora.alpha = inf: must be above 0 and finite"),
        (
            LoraConfig { dropout: f64::NAN, ..LoraConfig::default() },
            "lora.dropout = NaN: must be at least 0 and below 1",
        ),
        (LoraConfig { alpha: 0.0, ..LoraConfig::default() }, "lora.alpha = 0: must be above 0 and finite"),
        (LoraConfig { dropout: -0.1, ..LoraConfig::default() }, "lora.dropout = -0.1: must be at least 0 and below 1"),
    ] {
        assert_eq!(model.add_lora(&config, 1).unwrap_err().to_string(), message);
    }
    let saved = tempfile::tempdir().unwrap();
    let error = model.save_lora(saved.path(), "llama").unwrap_err().to_string();
    assert_eq!(error, "model to save the adapter of: expected one with an adapter, found one without");
    assert_eq!(fs::read_dir(saved.path()).unwrap().count(), 0);
}

/// In bfloat16 the factors stay in float32.
#[test]
fn factors_are_kept_in_float32() {
    let model = with_adapter("llama", "llama", Kind::BFloat16);
    let expected: HashMap<_, _> = read(folder("llama").join("adapter_model.safetensors"));
    for Parameter { name, tensor } in model.parameters() {
        assert_equal(&name, &tensor, &expected[&name]);
    }
    assert_eq!(logits(&model, Pass::default()).kind(), Kind::BFloat16);
}
