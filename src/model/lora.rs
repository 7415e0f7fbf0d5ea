//! LoRA adapters: their settings, their creation, and PEFT's folder format.

use std::path::Path;

use rand::distr::{Distribution, Uniform};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Tensor;

use super::{
    causal_lm::{CausalLm, TrainableLm},
    decoder::Decoder,
    linear::{Linear, Lora},
    weights::{FolderWeights, WeightSource, write_tensors},
};
use crate::{Error, ErrorKind, Result, digest::generator, error::Context, files};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Settings of a low-rank adapter (Hu et al. 2021). The defaults are the paper's.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `rank` | 64 | inner width of the factors | 1 to 65536 |
/// | `alpha` | 16 | the product is scaled by alpha / rank | above 0, finite |
/// | `dropout` | 0.1 | on the adapter's input, while training | 0 to below 1 |
/// | `target_modules` | every linear layer but the head | module names, or their last parts | names that the model has |
/// | `rank_stabilised` | false | scale by alpha / sqrt(rank) instead | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Inner width of the factors.
    pub rank: usize,
    /// The product of the factors is scaled by alpha / rank.
    pub alpha: f64,
    /// Dropout on the adapter's input while training.
    pub dropout: f64,
    /// The modules that get a pair of factors, by name ("model.layers.0.self_attn.q_proj") or by the last parts of it
    /// ("q_proj", "self_attn.q_proj"); empty: every linear layer but the head.
    pub target_modules: Vec<String>,
    /// Scale by alpha / sqrt(rank) instead (PEFT's `use_rslora`).
    pub rank_stabilised: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 64, alpha: 16.0, dropout: 0.1, target_modules: Vec::new(), rank_stabilised: false }
    }
}

impl LoraConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        // Wider than any layer; what overflows in a product with a layer's width is far above.
        if !(1..=65_536).contains(&self.rank) {
            return Err(Error::setting("lora.rank", self.rank, "from 1 to 65536"));
        }
        Error::check_positive("lora.alpha", self.alpha)?;
        Error::check_below_one("lora.dropout", self.dropout)
    }

    fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    fn targets(&self, module: &str) -> bool {
        self.target_modules.is_empty() || self.target_modules.iter().any(|target| is_named(module, target))
    }
}

impl Decoder {
    /// Puts a fresh adapter on the model, which then is what training changes: A uniform in ±1/sqrt(in), drawn from the
    /// seed and the module's name, B zero, so that the model's outputs stay what they were. Freezes the model's weights.
    ///
    /// # Errors
    /// If a setting is out of range, or a target module is none of the model's.
    pub fn add_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
        config.validate()?;
        self.check_targets(config)?;
        let (kind, device) = (self.master_kind(), self.device());
        let pairs = self.pairs(config, |linear| {
            let bound = 1.0 / (linear.inputs() as f64).sqrt();
            let uniform = Uniform::new_inclusive(-bound, bound)
                .map_err(|error| Error::mismatch("bound of an adapter's draws", "a finite number", error))?;
            let count = config.rank * linear.inputs() as usize;
            let values: Vec<f64> = uniform.sample_iter(generator(seed, "adapter", &linear.name)).take(count).collect();
            let a = Tensor::f_from_slice(&values)?.f_view([config.rank as i64, linear.inputs()])?;
            let b = Tensor::f_zeros([linear.outputs(), config.rank as i64], (kind, device))?;
            Ok((a.f_to_kind(kind)?.f_to_device(device)?, b))
        })?;
        self.attach(config, pairs)
    }

    /// Puts the adapter of a PEFT folder on the model.
    ///
    /// # Errors
    /// If a file is missing or asks for something other than plain LoRA on linear layers, or a factor is missing, too many
    /// or of the wrong shape.
    pub fn load_lora(&mut self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let mut config = read_config(&path)?;
        config.validate().context(|| format!("reading {}", path.display()))?;
        // As in PEFT, a list may name modules that this model does not have, as long as it has some of them.
        let named = !config.target_modules.is_empty();
        if let Some(target) = config.target_modules.iter().find(|target| !on_linear_layer(target)) {
            let supported = "linear layers of blocks are".to_string();
            let (key, value) = ("target_modules".to_string(), json!(target).to_string());
            return Err(ErrorKind::Unsupported { path, key, value, supported }.into());
        }
        config.target_modules.retain(|target| self.has_module(target));
        if named && config.target_modules.is_empty() {
            let message =
                format!("target_modules: the model has none of them; its modules are {:?}", self.last_parts());
            return Err(Error::file(&path, message));
        }
        let mut weights = FolderWeights::of_file(folder, folder.join(WEIGHTS))?;
        let (kind, device) = (self.master_kind(), self.device());
        let rank = config.rank as i64;
        let pairs = self.pairs(&config, |linear| {
            let mut factor = |name: &str, shape: [i64; 2]| -> Result<Tensor> {
                let tensor = weights.get(&format!("base_model.model.{}.{name}.weight", linear.name), &shape)?;
                Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
            };
            Ok((factor("lora_A", [rank, linear.inputs()])?, factor("lora_B", [linear.outputs(), rank])?))
        })?;
        weights.finish(|_| false)?;
        self.attach(&config, pairs)
    }

    /// Writes the adapter as PEFT does: adapter_config.json and adapter_model.safetensors. `base_model` is what the
    /// config names as the model that the adapter is for. An older adapter in the folder is replaced, its config being
    /// removed first and the new one written last.
    ///
    /// # Errors
    /// If there is no adapter, or a file cannot be written.
    pub fn save_lora(&self, folder: impl AsRef<Path>, base_model: &str) -> Result<()> {
        let folder = folder.as_ref();
        let Some(config) = &self.lora else {
            return Err(Error::mismatch("model to save the adapter of", "one with an adapter", "one without"));
        };
        let factors: Vec<(String, Tensor)> = (self.parameters().into_iter())
            .filter(|parameter| parameter.name.starts_with("base_model."))
            .map(|parameter| (parameter.name, parameter.tensor))
            .collect();
        // Without its config a folder does not load: one that was left half-written over an older adapter is none.
        let path = folder.join(CONFIG);
        files::remove(&path)?;
        write_tensors(&folder.join(WEIGHTS), &factors)?;
        files::write_json(&path, &self.peft_config(config, base_model))
    }

    fn peft_config(&self, config: &LoraConfig, base_model: &str) -> Value {
        let every = self.last_parts();
        let targets = match config.target_modules.as_slice() {
            [] => every,
            named => named.iter().map(String::as_str).collect(),
        };
        json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
            "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
            "target_modules": targets, "use_rslora": config.rank_stabilised, "use_dora": false,
            "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
            "modules_to_save": null, "layers_to_transform": null, "layers_pattern": null,
            "rank_pattern": {}, "alpha_pattern": {}, "revision": null
        })
    }

    fn check_targets(&self, config: &LoraConfig) -> Result<()> {
        for target in &config.target_modules {
            if !self.has_module(target) {
                let known = self.last_parts();
                let allowed = format!("one of {known:?}, or the full name of such a module");
                return Err(Error::setting("lora.target_modules", format!("{target:?}"), allowed));
            }
        }
        Ok(())
    }

    fn has_module(&self, target: &str) -> bool {
        self.linears().any(|linear| is_named(&linear.name, target))
    }

    /// The last parts of the names of all linear layers, each once, sorted.
    fn last_parts(&self) -> Vec<&str> {
        let mut parts: Vec<&str> = self.linears().filter_map(|linear| linear.name.rsplit('.').next()).collect();
        parts.sort_unstable();
        parts.dedup();
        parts
    }

    /// A pair of factors (A `[rank, in]`, B `[out, rank]`) for every targeted layer, none for the others.
    fn pairs(
        &self,
        config: &LoraConfig,
        mut factors: impl FnMut(&Linear) -> Result<(Tensor, Tensor)>,
    ) -> Result<Vec<Option<(Tensor, Tensor)>>> {
        let of = |linear: &Linear| config.targets(&linear.name).then(|| factors(linear)).transpose();
        self.linears().map(of).collect()
    }

    /// Puts the factors on the layers, instead of those that were there.
    fn attach(&mut self, config: &LoraConfig, pairs: Vec<Option<(Tensor, Tensor)>>) -> Result<()> {
        self.freeze_all_weights()?;
        for (linear, pair) in self.linears_mut().zip(pairs) {
            linear.lora = match pair {
                Some((a, b)) => Some(Lora {
                    a: a.f_set_requires_grad(true)?,
                    b: b.f_set_requires_grad(true)?,
                    scale: config.scale(),
                    dropout: config.dropout,
                }),
                None => None,
            };
        }
        self.lora = Some(config.clone());
        Ok(())
    }
}

/// Whether `target` is the module's whole name or its last parts: PEFT's rule for a list of target modules.
fn is_named(module: &str, target: &str) -> bool {
    module == target || module.strip_suffix(target).is_some_and(|front| front.ends_with('.'))
}

/// Keys of adapter_config.json that change what an adapter does, and the values that mean plain LoRA.
fn is_plain(key: &str, value: &Value) -> bool {
    let nothing =
        value.is_null() || value.as_bool() == Some(false) || value.as_object().is_some_and(|map| map.is_empty());
    match key {
        "peft_type" => value == "LORA",
        "bias" => nothing || value == "none",
        // The others, "pissa" say, change the model's own weights when PEFT loads the adapter.
        "init_lora_weights" => value.as_str().is_none_or(|name| ["gaussian", "orthogonal", "eva"].contains(&name)),
        "use_dora"
        | "fan_in_fan_out"
        | "modules_to_save"
        | "layers_to_transform"
        | "rank_pattern"
        | "alpha_pattern"
        | "trainable_token_indices"
        | "target_parameters"
        | "exclude_modules"
        | "layer_replication"
        | "lora_bias"
        | "arrow_config"
        | "kasa_config"
        | "monteclora_config"
        | "velora_config"
        | "use_bdlora"
        | "use_qalora"
        | "alora_invocation_tokens" => nothing || value.as_array().is_some_and(|list| list.is_empty()),
        _ => true,
    }
}

/// PEFT also adapts the head and the embedding, which have no place here.
fn on_linear_layer(target: &str) -> bool {
    !["lm_head", "embed_tokens"].contains(&target.rsplit('.').next().unwrap_or(target))
}

fn read_config(path: &Path) -> Result<LoraConfig> {
    let json: Value = files::read_json(path)?;
    let map = json.as_object().ok_or_else(|| Error::file(path, "expected a JSON object"))?;
    if let Some((key, value)) = map.iter().find(|(key, value)| !is_plain(key, value)) {
        let supported = "plain LoRA on linear layers is".to_string();
        let (key, value) = (key.clone(), value.to_string());
        return Err(ErrorKind::Unsupported { path: path.to_path_buf(), key, value, supported }.into());
    }
    let wrong = |key: &str, expected: &str| {
        let found = json.get(key).map_or("nothing".to_string(), Value::to_string);
        Error::file(path, format!("{key}: expected {expected}, found {found}"))
    };
    let rank = json["r"].as_u64().ok_or_else(|| wrong("r", "a whole number"))? as usize;
    let alpha = json["lora_alpha"].as_f64().ok_or_else(|| wrong("lora_alpha", "a number"))?;
    let dropout = json.get("lora_dropout").map_or(Some(0.0), Value::as_f64);
    let targets = match &json["target_modules"] {
        Value::String(all) if all == "all-linear" => Some(Vec::new()),
        // An empty list would mean every layer to us, and nothing to PEFT.
        Value::Array(list) if !list.is_empty() => {
            list.iter().map(|name| name.as_str().map(str::to_string)).collect::<Option<_>>()
        }
        _ => None,
    };
    let rank_stabilised = match &json["use_rslora"] {
        Value::Null => Some(false),
        given => given.as_bool(),
    };
    Ok(LoraConfig {
        rank,
        alpha,
        dropout: dropout.ok_or_else(|| wrong("lora_dropout", "a number"))?,
        target_modules: targets
            .ok_or_else(|| wrong("target_modules", "a list of names, not empty, or \"all-linear\""))?,
        rank_stabilised: rank_stabilised.ok_or_else(|| wrong("use_rslora", "true or false"))?,
    })
}
