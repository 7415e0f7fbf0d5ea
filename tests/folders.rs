//! Model folders: written and read, in every dtype, and refused by name where they are not what they should be.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use advtrain::{
    CausalLm, Decoder, DecoderConfig, Input, Layout, LoraConfig, Parameter, Pass, TrainableLm,
    tch::{self, Device, Kind, Tensor},
};
use common::{MODELS, assert_close, distance, fixture, load, read, some_ids};
use serde_json::{Value, json};
use tempfile::TempDir;

fn logits(model: &dyn CausalLm) -> Tensor {
    let layout = Layout::of_lengths(&[9, 20]);
    let embeddings = model.embed(&Tensor::from_slice(&some_ids(5, layout.tokens()))).unwrap();
    let input = Input::of_embeddings(embeddings, &layout, Pass::default()).unwrap();
    model.logits(&model.hidden(&input).unwrap().last).unwrap().detach()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_saved_model_is_the_same_model() {
    for name in MODELS {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let model = load(name, kind);
            let saved = tempfile::tempdir().unwrap();
            model.save(saved.path()).unwrap();
            assert_eq!(names(saved.path()), ["config.json", "model.safetensors"]);
            let again = Decoder::load(saved.path(), kind, Device::Cpu).unwrap();
            assert!(logits(&again).equal(&logits(&model)), "{name}, {kind:?}");
            assert_eq!(again.config(), model.config(), "{name}");
        }
    }
}

/// The names and shapes that transformers gave them, and the same bytes.
#[test]
fn weights_are_written_as_transformers_writes_them() {
    for name in MODELS.iter().filter(|name| !name.ends_with("sharded")) {
        let saved = tempfile::tempdir().unwrap();
        load(name, Kind::Float).save(saved.path()).unwrap();
        let sorted = |path: PathBuf| -> BTreeMap<String, Tensor> { read(path).into_iter().collect() };
        let ours = sorted(saved.path().join("model.safetensors"));
        let theirs = sorted(fixture("models").join(name).join("model.safetensors"));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        for (key, tensor) in &theirs {
            assert!(ours[key].kind() == tensor.kind() && ours[key].equal(tensor), "{name}: {key}");
        }
    }
}

#[test]
fn an_adapter_is_merged_into_what_is_saved() {
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-12)] {
        let mut model = load("phi3", kind);
        let base = logits(&model);
        model.add_lora(&LoraConfig { rank: 3, ..LoraConfig::default() }, 1).unwrap();
        {
            let _guard = tch::no_grad_guard();
            for Parameter { mut tensor, .. } in model.parameters() {
                let waves = Tensor::arange(tensor.numel() as i64, (Kind::Double, Device::Cpu)).sin() * 0.2;
                tensor.copy_(&waves.view(tensor.size().as_slice()));
            }
        }
        let expected = logits(&model);
        assert!(distance(&expected, &base) > 1e-2);
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path()).unwrap();
        let merged = Decoder::load(saved.path(), kind, Device::Cpu).unwrap();
        assert!(merged.lora().is_none());
        assert_close("merged", &logits(&merged), &expected, tolerance);
        assert!(logits(&model).equal(&expected), "saving changed the model");
    }
}

/// Largest differences from float32, relative to the largest logit, over the fixtures, as measured: 3.5e-2 in
/// bfloat16 and 4.4e-3 in float16. The fixtures' weights are large; the tolerances are twice that.
#[test]
fn half_precision_is_near_float32() {
    for name in MODELS {
        let expected = logits(&load(name, Kind::Float));
        for (kind, tolerance) in [(Kind::BFloat16, 7e-2), (Kind::Half, 9e-3)] {
            let model = load(name, kind);
            assert_eq!(model.kind(), kind);
            let found = logits(&model);
            assert_eq!(found.kind(), kind);
            assert_close(&format!("{name}, {kind:?}"), &found, &expected, tolerance);
            assert!(distance(&found, &expected) > 1e-5, "{name}, {kind:?}: computed in another dtype");
        }
    }
}

/// A file in bfloat16 or float16 is widened where float32 is asked for.
#[test]
fn the_dtype_asked_for_wins_over_the_files() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let narrow = load("qwen2", kind);
        let saved = tempfile::tempdir().unwrap();
        narrow.save(saved.path()).unwrap();
        let wide = Decoder::load(saved.path(), Kind::Float, Device::Cpu).unwrap();
        assert_eq!(wide.embedding().kind(), Kind::Float);
        assert!(wide.embedding().equal(&narrow.embedding().to_kind(Kind::Float)));
        assert!(distance(&logits(&wide), &logits(&load("qwen2", Kind::Float))) < 9e-2);
    }
}

#[test]
fn saving_over_an_older_sharded_model_leaves_one_model() {
    let folder = copy_of("mistral-sharded");
    let model = load("mistral-nowindow", Kind::Float);
    model.save(folder.path()).unwrap();
    assert!(!folder.path().join("model.safetensors.index.json").exists());
    let again = Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap();
    assert!(logits(&again).equal(&logits(&model)));
}

#[test]
fn a_failed_save_says_where_and_leaves_nothing_half_written() {
    let model = load("llama", Kind::Float);
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let error = model.save(&file).unwrap_err().to_string();
    assert!(error.contains(file.to_str().unwrap()), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "in the way");

    // The weights cannot take their place: a folder of that name is not empty.
    let folder = home.path().join("folder");
    fs::create_dir_all(folder.join("model.safetensors/occupied")).unwrap();
    let error = model.save(&folder).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    assert_eq!(names(&folder), ["model.safetensors"]);
}

fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(fixture("models").join(name)).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_name().unwrap();
        if !name.to_str().unwrap().starts_with("expected") {
            fs::copy(&file, copy.path().join(name)).unwrap();
        }
    }
    copy
}

fn assert_refused(folder: &TempDir, words: &[&str]) {
    let error = Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap_err().to_string();
    let path = folder.path().to_str().unwrap();
    for word in words.iter().chain(&[path]) {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
}

fn change_config(folder: &TempDir, change: impl FnOnce(&mut Value)) {
    let path = folder.path().join("config.json");
    let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn change_weights(folder: &TempDir, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = folder.path().join("model.safetensors");
    let mut tensors: BTreeMap<String, Tensor> = read(path.clone()).into_iter().collect();
    change(&mut tensors);
    Tensor::write_safetensors(&tensors.iter().collect::<Vec<_>>(), path).unwrap();
}

#[test]
fn missing_files_are_named() {
    let nowhere = tempfile::tempdir().unwrap();
    assert_refused(&nowhere, &["config.json"]);
    let error = DecoderConfig::read(nowhere.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");

    let folder = copy_of("llama");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert_refused(&folder, &["model.safetensors"]);

    let folder = copy_of("mistral-sharded");
    fs::remove_file(folder.path().join("model-00003-of-00004.safetensors")).unwrap();
    assert_refused(&folder, &["model-00003-of-00004.safetensors"]);
}

#[test]
fn an_index_that_is_none_is_named() {
    let folder = copy_of("mistral-sharded");
    let index = folder.path().join("model.safetensors.index.json");
    for (text, words) in [
        ("[", "not JSON"),
        ("{}", "weight_map: expected an object"),
        (
            r#"{"weight_map": {"model.norm.weight": 3}}"#,
            "weight_map.model.norm.weight: expected the name of a file of this folder, found 3",
        ),
        (
            r#"{"weight_map": {"model.norm.weight": "../model.safetensors"}}"#,
            "weight_map.model.norm.weight: expected the name of a file of this folder, found \"../model.safetensors\"",
        ),
        (
            r#"{"weight_map": {"model.norm.weight": "model-00001-of-00004.safetensors"}}"#,
            "weight_map.model.norm.weight: \"model-00001-of-00004.safetensors\" has no such tensor",
        ),
    ] {
        fs::write(&index, text).unwrap();
        assert_refused(&folder, &["model.safetensors.index.json", words]);
    }
    // An index that forgets a file: its tensors are missing.
    let only = json!({"weight_map": {"lm_head.weight": "model-00004-of-00004.safetensors"}});
    fs::write(&index, only.to_string()).unwrap();
    assert_refused(&folder, &["tensor \"", "is missing"]);
}

/// Shards may hold copies of the same tensor; the index says which one counts.
#[test]
fn the_index_decides_which_shard_a_tensor_is_read_from() {
    const TENSOR: &str = "lm_head.weight";
    let folder = copy_of("mistral-sharded");
    let shards = ["model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"];
    let path = |shard: &str| folder.path().join(shard);
    let own: Tensor = shards.iter().find_map(|shard| read(path(shard)).remove(TENSOR)).unwrap();
    let mut distances = Vec::new();
    for (number, shard) in shards.iter().enumerate() {
        let mut tensors = read(path(shard));
        tensors.insert(TENSOR.into(), &own * (number as f64 + 2.0));
        Tensor::write_safetensors(&tensors.into_iter().collect::<Vec<_>>(), path(shard)).unwrap();
    }
    let index = path("model.safetensors.index.json");
    for (number, shard) in shards.iter().enumerate() {
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&index).unwrap()).unwrap();
        json["weight_map"][TENSOR] = json!(shard);
        fs::write(&index, json.to_string()).unwrap();
        let saved = tempfile::tempdir().unwrap();
        Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap().save(saved.path()).unwrap();
        let found = &read(saved.path().join("model.safetensors"))[TENSOR];
        distances.push(distance(found, &(&own * (number as f64 + 2.0))));
    }
    assert_eq!(distances, [0.0, 0.0]);
}

/// Whatever cuts a save short leaves a folder that does not load, not new weights under an old config.
#[test]
fn what_is_half_written_over_an_older_folder_does_not_load() {
    let mut model = load("llama", Kind::Float);
    model.add_lora(&LoraConfig { rank: 2, ..LoraConfig::default() }, 1).unwrap();
    for (weights, config) in
        [("model.safetensors", "config.json"), ("adapter_model.safetensors", "adapter_config.json")]
    {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path();
        let save = || if config == "config.json" { model.save(folder) } else { model.save_lora(folder, "llama") };
        save().unwrap();
        // The new weights cannot take their place.
        fs::remove_file(folder.join(weights)).unwrap();
        fs::create_dir_all(folder.join(weights).join("occupied")).unwrap();
        assert!(save().unwrap_err().to_string().contains(weights));
        assert_eq!(names(folder), [weights]);
        let error = match config {
            "config.json" => Decoder::load(folder, Kind::Float, Device::Cpu).unwrap_err(),
            _ => load("llama", Kind::Float).load_lora(folder).unwrap_err(),
        };
        assert!(error.to_string().contains(folder.join(config).to_str().unwrap()), "{error}");
    }
}

/// They name code and a path that the folder written does not have.
#[test]
fn keys_that_point_elsewhere_are_not_written() {
    let folder = copy_of("phi3");
    change_config(&folder, |json| {
        json["auto_map"] = json!({"AutoConfig": "configuration_phi3.Phi3Config"});
        json["_name_or_path"] = json!("/home/somebody/phi3");
    });
    let saved = tempfile::tempdir().unwrap();
    Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap().save(saved.path()).unwrap();
    let json: Value = serde_json::from_str(&fs::read_to_string(saved.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((json.get("auto_map"), json.get("_name_or_path")), (None, None));
    assert_eq!(json["model_type"], "phi3");
}

#[test]
fn weights_that_are_not_what_they_should_be_are_named() {
    const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for damaged in
        [&whole[..whole.len() - 1], &whole[..whole.len() / 2], &whole[..100], &whole[..4], b"", b"not weights"]
    {
        fs::write(&path, damaged).unwrap();
        assert_refused(&folder, &["model.safetensors", "not a whole safetensors file"]);
    }
    // What torch.save writes begins like this.
    fs::write(&path, b"PK\x03\x04 and the rest of a zip file, of some length").unwrap();
    assert_refused(&folder, &["model.safetensors", "not a whole safetensors file"]);

    let folder = copy_of("llama");
    change_weights(&folder, |tensors| {
        let tensor = tensors.get_mut(TENSOR).unwrap();
        *tensor = tensor.narrow(0, 0, 1).contiguous();
    });
    assert_refused(&folder, &["model.safetensors", TENSOR, "expected shape [48, 32], found [1, 32]"]);

    let folder = copy_of("llama");
    change_weights(&folder, |tensors| assert!(tensors.remove(TENSOR).is_some()));
    assert_refused(&folder, &[TENSOR, "of shape [48, 32] is missing"]);

    let folder = copy_of("llama");
    let zeros = || Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
    change_weights(&folder, |tensors| {
        tensors.insert("model.layers.2.extra.weight".into(), zeros());
    });
    assert_refused(&folder, &["1 tensors that the config has no place for", "model.layers.2.extra.weight"]);

    // What older exports carry is no error: rotary frequencies, and a copy of a tied head.
    let folder = copy_of("llama");
    change_weights(&folder, |tensors| {
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros());
        tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].copy());
    });
    Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap();
    change_weights(&folder, |tensors| {
        tensors.insert("lm_head.weight".into(), &tensors["model.embed_tokens.weight"] + 0.1);
    });
    assert_refused(&folder, &["tie_word_embeddings is true, and \"lm_head.weight\" is another matrix"]);
}

#[test]
fn weights_in_another_form_are_named() {
    let folder = copy_of("llama");
    fs::rename(folder.path().join("model.safetensors"), folder.path().join("pytorch_model.bin")).unwrap();
    assert_refused(
        &folder,
        &["expected model.safetensors, or model.safetensors.index.json", "found pytorch_model.bin"],
    );
    fs::remove_file(folder.path().join("pytorch_model.bin")).unwrap();
    assert_refused(&folder, &["found no file of weights"]);
}

#[test]
fn a_dtype_that_is_not_supported_is_named() {
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let data = fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&data[8..8 + header_len]).unwrap();
    // Four bytes wide as float32 is, so that the file stays whole.
    header["model.embed_tokens.weight"]["dtype"] = json!("U32");
    let header = header.to_string();
    let changed = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data[8 + header_len..]].concat();
    fs::write(&path, changed).unwrap();
    assert_refused(&folder, &["model.safetensors", "model.embed_tokens.weight", "dtype U32 is not supported"]);
}

#[test]
fn configs_that_ask_for_something_else_are_named() {
    let folder = copy_of("llama");
    fs::write(folder.path().join("config.json"), "{\"model_type\": ").unwrap();
    assert_refused(&folder, &["config.json: not JSON"]);
    fs::write(folder.path().join("config.json"), "[]").unwrap();
    assert_refused(&folder, &["config.json: expected a JSON object"]);
    for (key, value, words) in [
        ("model_type", json!("gpt_neox"), "model_type = \"gpt_neox\" is not supported"),
        ("model_type", Value::Null, "model_type: expected the name of a family"),
        ("hidden_size", Value::Null, "hidden_size: expected a whole number from 1"),
        ("vocab_size", json!(95), "model.embed_tokens.weight\": expected shape [95, 32], found [96, 32]"),
        ("quantization_config", json!({"quant_method": "gptq"}), "quantization_config"),
        ("num_hidden_layers", json!(1), "tensors that the config has no place for"),
        ("num_hidden_layers", json!(3), "model.layers.2."),
    ] {
        let folder = copy_of("llama");
        change_config(&folder, |json| json[key] = value);
        assert_refused(&folder, &[words]);
    }
}

/// Absent is not null: transformers has a default of its own there.
#[test]
fn a_mistral_without_a_window_has_transformers_default() {
    for (value, expected) in [(None, Some(4096)), (Some(Value::Null), None), (Some(json!(7)), Some(7))] {
        let folder = copy_of("mistral");
        change_config(&folder, |json| {
            json.as_object_mut().unwrap().remove("sliding_window");
            if let Some(value) = value {
                json["sliding_window"] = value;
            }
        });
        assert_eq!(DecoderConfig::read(folder.path()).unwrap().sliding_window, expected);
    }
}

#[test]
fn a_fingerprint_tells_weights_apart_and_knows_no_dtype() {
    let fingerprint = |folder: &Path, kind| Decoder::load(folder, kind, Device::Cpu).unwrap().fingerprint().unwrap();
    let folder = copy_of("llama");
    let original = fingerprint(folder.path(), Kind::Float);
    assert_eq!(load("llama", Kind::Float).fingerprint().unwrap(), original);
    // The same numbers in another order.
    change_weights(&folder, |tensors| {
        let table = tensors.get_mut("model.embed_tokens.weight").unwrap();
        *table = table.flip([0]).contiguous();
    });
    assert_ne!(fingerprint(folder.path(), Kind::Float), original);
    let narrow = tempfile::tempdir().unwrap();
    load("llama", Kind::BFloat16).save(narrow.path()).unwrap();
    let of_narrow = fingerprint(narrow.path(), Kind::BFloat16);
    assert_eq!(fingerprint(narrow.path(), Kind::Float), of_narrow);
    assert_ne!(of_narrow, original);
}
