//! Writing a model as a Hugging Face folder that transformers 4.x and 5.x read alike.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Tensor;

use super::{causal_lm::CausalLm, config::Family, decoder::Decoder, weights::write_shards};
use crate::{Dtype, Parameter, Result, files};

impl Decoder {
    /// Writes config.json and the weights, the adapter merged in, in the compute dtype: in half precision the sum is rounded,
    /// so that the folder's numbers differ from the adapter's by that, and by all of it after a run of few updates. The
    /// tokenizer's files are the caller's to add. An older model in the folder is replaced, its config.json being removed first and the new one
    /// written last.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_in_shards(folder, 5_000_000_000)
    }

    /// As [`Decoder::save`], in files of at most `largest` bytes of weights (a tensor that is larger has a file of its own)
    /// where `save` has 5 GB.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save_in_shards(&self, folder: impl AsRef<Path>, largest: usize) -> Result<()> {
        let folder = folder.as_ref();
        let _guard = tch::no_grad_guard();
        // Without its config a folder does not load: one that was left half-written over an older model is none.
        let config = folder.join("config.json");
        files::remove(&config)?;
        write_shards(folder, self.weights(), largest, |parameter| self.merged(parameter))?;
        files::write_json(&config, &self.export_config())
    }

    /// A weight, the adapter merged in where its layer has one.
    fn merged(&self, weight: &Parameter) -> Result<Tensor> {
        let mut adapted = self.linears().filter(|linear| linear.lora.is_some());
        match adapted.find(|linear| weight.name.strip_suffix(".weight") == Some(&linear.name)) {
            Some(linear) => linear.merged(),
            None => Ok(weight.tensor.shallow_clone()),
        }
    }

    fn export_config(&self) -> Value {
        let mut map = self.source_config.as_object().cloned().unwrap_or_default();
        // Code and a path of the folder that the model came from, which are not part of this one.
        for key in ["auto_map", "_name_or_path"] {
            map.shift_remove(key);
        }
        let dtype = Dtype::of(self.kind());
        map.insert("dtype".into(), json!(dtype));
        map.insert("torch_dtype".into(), json!(dtype));
        if self.config.family == Family::Gemma {
            // As it was read: see `hf_config.rs`.
            map.insert("hidden_act".into(), json!("gelu_pytorch_tanh"));
            map.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
        }
        if let Some(Value::Object(rope)) = map.get("rope_parameters").cloned() {
            add_old_rope(&mut map, rope, self.config.family);
        }
        Value::Object(map)
    }
}

/// Says the rotary settings of the 5.x dialect in the 4.x dialect too.
fn add_old_rope(map: &mut Map<String, Value>, mut rope: Map<String, Value>, family: Family) {
    for key in ["rope_theta", "partial_rotary_factor"] {
        if let Some(value) = rope.remove(key) {
            map.entry(key).or_insert(value);
        }
    }
    let kind = rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str).unwrap_or("default").to_string();
    if kind == "default" {
        map.insert("rope_scaling".into(), Value::Null);
        return;
    }
    if let Some(original) = rope.get("original_max_position_embeddings") {
        map.entry("original_max_position_embeddings").or_insert(original.clone());
    }
    if family == Family::Phi3 {
        // transformers 4.x wants exactly these three for Phi-3.
        rope.retain(|key, _| key == "short_factor" || key == "long_factor");
        rope.insert("type".into(), json!("longrope"));
    }
    map.insert("rope_scaling".into(), Value::Object(rope));
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn shards_hold_what_fits_and_are_read_back() {
        let json = json!({
            "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2
        });
        let model = |seed| Decoder::random(json.clone(), 0.1, seed, Kind::Float, Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        // An older model in one file, which must not be read instead.
        model(1).save(folder.path()).unwrap();
        // The largest tensor has 24 * 8 * 4 bytes and gets a shard of its own.
        model(2).save_in_shards(folder.path(), 700).unwrap();
        let index = files::read_text(&folder.path().join("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_str(&index).unwrap();
        let weights = model(2).weights();
        let bytes: usize = weights.iter().map(|one| one.tensor.numel() * 4).sum();
        assert_eq!(index["metadata"]["total_size"], bytes);
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), weights.len());
        let mut sizes = std::collections::BTreeMap::new();
        for one in &weights {
            *sizes.entry(map[&one.name].as_str().unwrap()).or_insert(0) += one.tensor.numel() * 4;
        }
        assert!(sizes.len() > 3 && sizes.values().all(|size| *size <= 768), "{sizes:?}");
        let written = || -> Vec<String> {
            let mut names: Vec<_> = (std::fs::read_dir(folder.path()).unwrap())
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.ends_with(".safetensors"))
                .collect();
            names.sort();
            names
        };
        assert!(written().iter().eq(sizes.keys().copied()), "{:?}", written());
        let again = Decoder::load(folder.path(), Kind::Float, Device::Cpu).unwrap();
        for (found, expected) in again.weights().iter().zip(&weights) {
            assert!(found.tensor.equal(&expected.tensor), "{}", expected.name);
        }
        // Larger shards over smaller ones, and one file over those: nothing of the older ones stays.
        model(3).save_in_shards(folder.path(), 1500).unwrap();
        let last = format!("of-{:05}.safetensors", written().len());
        assert!(written().len() > 1 && written().iter().all(|name| name.ends_with(&last)), "{:?}", written());
        model(3).save(folder.path()).unwrap();
        assert_eq!(written(), ["model.safetensors"]);
    }
}
