//! Reading `config.json` as Hugging Face transformers 4.x and 5.x write it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::config::{Activation, DecoderConfig, Family, NormKind, Projection, RopeConfig, RopeScaling};
use crate::{Error, ErrorKind, Result, files};

const SUPPORTED: &str = "gemma, phi3, mistral, llama and qwen2 are";
/// No matrix has more numbers than this, so that neither they nor their bytes can overflow what counts them.
const LARGEST: usize = 1 << 40;
const COUNT: &str = "a whole number from 1 to 2147483647";
const POSITIVE: &str = "a number above 0";

impl DecoderConfig {
    /// Reads `config.json` of a model folder, in either dialect.
    ///
    /// # Errors
    /// If the file is missing or not JSON, a needed key is missing or of the wrong type, or a key asks for something that
    /// is not implemented: the message names the key and its value.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        Self::from_json(&files::read_json(&path)?, path)
    }

    /// Reads the value of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`DecoderConfig::read`].
    pub fn from_json(json: &Value, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let Some(map) = json.as_object() else {
            return Err(Error::file(path, "expected a JSON object"));
        };
        let config = ConfigFile { path, map, prefix: "" };
        let parsed = config.decoder()?;
        config.check(&parsed)?;
        Ok(parsed)
    }
}

/// A JSON object with the path it came from. `null` counts as absent, as in transformers.
struct ConfigFile<'a> {
    path: PathBuf,
    map: &'a Map<String, Value>,
    prefix: &'static str,
}

impl ConfigFile<'_> {
    fn decoder(&self) -> Result<DecoderConfig> {
        let family = self.family()?;
        self.refuse_unsupported()?;
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let head_dim = match (self.count_or_none("head_dim")?, family) {
            (Some(head_dim), _) => head_dim,
            (None, Family::Gemma) => 256,
            (None, _) if heads > hidden => {
                let expected = format!("at most hidden_size = {hidden}");
                return Err(self.wrong("num_attention_heads", &expected, self.get("num_attention_heads")));
            }
            (None, _) => hidden / heads,
        };
        let bias = self.flag_or("attention_bias", false)?;
        let fused = if family == Family::Phi3 { Projection::Fused } else { Projection::Split };
        let gemma = family == Family::Gemma;
        Ok(DecoderConfig {
            family,
            vocabulary: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: self.count_or_none("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            norm: if gemma { NormKind::UnitOffset } else { NormKind::Plain },
            norm_epsilon: self.positive_or("rms_norm_eps", if family == Family::Phi3 { 1e-5 } else { 1e-6 })?,
            activation: self.activation(family)?,
            scales_embeddings: gemma,
            qkv: fused,
            gate_up: fused,
            qkv_bias: bias || family == Family::Qwen2,
            output_bias: bias && family != Family::Qwen2,
            mlp_bias: family == Family::Llama && self.flag_or("mlp_bias", false)?,
            rope: self.rope(head_dim)?,
            sliding_window: self.sliding_window(family)?,
            tied_head: self.flag_or("tie_word_embeddings", gemma)?,
            max_positions: self.count_or_none("max_position_embeddings")?.unwrap_or(2048),
        })
    }

    fn family(&self) -> Result<Family> {
        let Some(model_type) = self.get("model_type").and_then(Value::as_str) else {
            return Err(self.wrong("model_type", "the name of a family", self.get("model_type")));
        };
        match model_type {
            "gemma" => Ok(Family::Gemma),
            "phi3" => Ok(Family::Phi3),
            "mistral" => Ok(Family::Mistral),
            "llama" => Ok(Family::Llama),
            "qwen2" => Ok(Family::Qwen2),
            _ => Err(self.unsupported("model_type", SUPPORTED)),
        }
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if self.get("quantization_config").is_some() {
            return Err(self.unsupported("quantization_config", "weights in float32, bfloat16 and float16 are"));
        }
        for key in ["attention_dropout", "resid_pdrop", "embd_pdrop"] {
            if self.get(key).is_some_and(|value| value.as_f64() != Some(0.0)) {
                return Err(self.unsupported(key, "0.0 is"));
            }
        }
        if self.flag_or("use_bidirectional_attention", false)? {
            return Err(self.unsupported("use_bidirectional_attention", "false is"));
        }
        if self.get("pretraining_tp").is_some_and(|value| value != 1) {
            return Err(self.unsupported("pretraining_tp", "1 is"));
        }
        Ok(())
    }

    fn activation(&self, family: Family) -> Result<Activation> {
        if family == Family::Gemma {
            // Gemma was trained with the tanh form, which early folders call "gelu".
            for key in ["hidden_activation", "hidden_act"] {
                match self.get(key).and_then(Value::as_str) {
                    None | Some("gelu_pytorch_tanh") => {}
                    Some("gelu") => tracing::warn!(
                        path = %self.path.display(),
                        "{key} = \"gelu\" is read as gelu_pytorch_tanh, which Gemma was trained with; transformers computes what \
                         hidden_act says: set it to gelu_pytorch_tanh there for the same numbers"
                    ),
                    Some(_) => return Err(self.unsupported(key, "gelu_pytorch_tanh is, for Gemma")),
                }
            }
            return Ok(Activation::GeluTanh);
        }
        match self.get("hidden_act").map_or(Some("silu"), Value::as_str) {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::Gelu),
            _ => Err(self.unsupported("hidden_act", "silu, gelu and gelu_pytorch_tanh are")),
        }
    }

    fn sliding_window(&self, family: Family) -> Result<Option<usize>> {
        match family {
            // Absent is not null here: transformers then takes its own default.
            Family::Mistral if !self.map.contains_key("sliding_window") => Ok(Some(4096)),
            Family::Mistral | Family::Phi3 => self.count_or_none("sliding_window"),
            Family::Qwen2 if self.flag_or("use_sliding_window", false)? => {
                Err(self.unsupported("use_sliding_window", "false is, for Qwen2"))
            }
            _ => Ok(None),
        }
    }

    /// 4.x: `rope_theta` at the top and an object `rope_scaling`; 5.x: all in one object `rope_parameters`.
    fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let empty = Map::new();
        let inner = |key: &'static str| match self.get(key) {
            Some(Value::Object(map)) => Ok(Some(map)),
            None => Ok(None),
            Some(_) => Err(self.wrong(key, "an object or null", self.get(key))),
        };
        let dialects = [("rope_parameters.", inner("rope_parameters")?), ("rope_scaling.", inner("rope_scaling")?)];
        let found = dialects.into_iter().filter_map(|(prefix, map)| map.map(|map| self.rope_of(map, prefix, head_dim)));
        let mut found = found.collect::<Result<Vec<_>>>()?.into_iter();
        match (found.next(), found.next()) {
            (Some(one), Some(other)) if one != other => {
                let message =
                    "rope_parameters and rope_scaling say different things, and readers differ in which counts";
                Err(Error::file(&self.path, message))
            }
            (Some(rope), _) => Ok(rope),
            (None, _) => self.rope_of(&empty, "", head_dim),
        }
    }

    /// Of one of the two objects, or of an empty one.
    fn rope_of(&self, map: &Map<String, Value>, prefix: &'static str, head_dim: usize) -> Result<RopeConfig> {
        let scaling = ConfigFile { path: self.path.clone(), map, prefix };
        let either = |key: &str, default: f64| match scaling.positive_or_none(key)? {
            Some(value) => Ok(value),
            None => self.positive_or(key, default),
        };
        let rotated = either("partial_rotary_factor", 1.0)?;
        if rotated != 1.0 && self.family()? != Family::Phi3 {
            return Err(self.unsupported("partial_rotary_factor", "1.0 is, but for Phi-3"));
        }
        let rotary_dim = (head_dim as f64 * rotated) as usize;
        Ok(RopeConfig { theta: either("rope_theta", 10_000.0)?, rotary_dim, scaling: self.scaling(&scaling)? })
    }

    fn scaling(&self, inner: &ConfigFile) -> Result<RopeScaling> {
        let key = if inner.get("rope_type").is_some() { "rope_type" } else { "type" };
        match inner.get(key).map_or(Some("default"), Value::as_str) {
            Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: inner.positive("factor")? }),
            Some("llama3") => inner.llama3(),
            Some("longrope" | "su") => self.long_rope(inner),
            _ => Err(inner.unsupported(key, "default, linear, llama3 and longrope (su) are")),
        }
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if high <= low {
            let expected = format!("a number above low_freq_factor = {low}");
            return Err(self.wrong("high_freq_factor", &expected, self.get("high_freq_factor")));
        }
        let original = self.positive("original_max_position_embeddings")?;
        Ok(RopeScaling::Llama3 { factor: self.positive("factor")?, low, high, original })
    }

    fn long_rope(&self, inner: &ConfigFile) -> Result<RopeScaling> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let longest = self.count("max_position_embeddings")?;
        // What transformers takes for Phi-3, whatever stands inside.
        let default = (self.family()? == Family::Phi3).then_some(4096);
        let (within, outer) = (inner.count_or_none(ORIGINAL)?, self.count_or_none(ORIGINAL)?.or(default));
        let original = within.or(outer).unwrap_or(longest);
        if outer.is_some_and(|outer| outer != original) {
            let supported = format!("the {} beside it is: readers differ in which counts", outer.unwrap_or_default());
            return Err(inner.unsupported(ORIGINAL, &supported));
        }
        if original < 2 {
            let message = format!("{ORIGINAL} = {original}: expected at least 2, as its logarithm is divided by");
            return Err(Error::file(&self.path, message));
        }
        let ratio = longest as f64 / original as f64;
        let factor = inner.positive_or("factor", ratio.max(1.0))?;
        if original < longest && (factor - ratio).abs() > 1e-6 * ratio {
            let supported = format!("{ratio} is, max_position_embeddings / {ORIGINAL}: readers differ in which counts");
            return Err(inner.unsupported("factor", &supported));
        }
        let by_factor = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
        let attention_factor = inner.positive_or("attention_factor", by_factor)?;
        if self.family()? == Family::Phi3 && (attention_factor - by_factor).abs() > 1e-6 * by_factor {
            let supported = format!("{by_factor} is, for Phi-3: transformers 4 has no such key there");
            return Err(inner.unsupported("attention_factor", &supported));
        }
        Ok(RopeScaling::Long {
            short: inner.positives("short_factor")?,
            long: inner.positives("long_factor")?,
            original,
            attention_factor,
        })
    }

    fn check(&self, config: &DecoderConfig) -> Result<()> {
        self.check_sizes(config)?;
        if !config.heads.is_multiple_of(config.kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {}", config.heads);
            return Err(self.wrong("num_key_value_heads", &expected, self.get("num_key_value_heads")));
        }
        let rotary = config.rope.rotary_dim;
        if rotary == 0 || !rotary.is_multiple_of(2) || rotary > config.head_dim {
            let message = format!(
                "partial_rotary_factor: rotates {rotary} of {} numbers of a head; expected an even number of them",
                config.head_dim
            );
            return Err(Error::file(&self.path, message));
        }
        if let RopeScaling::Long { short, long, .. } = &config.rope.scaling {
            for (key, factors) in [("short_factor", short), ("long_factor", long)] {
                if factors.len() != rotary / 2 {
                    let message = format!("{key}: expected {} numbers, found {}", rotary / 2, factors.len());
                    return Err(Error::file(&self.path, message));
                }
            }
        }
        self.check_layer_types(config)
    }

    /// transformers reads this list for Qwen2 alone; anywhere else one that says something other than `sliding_window` does
    /// would be ignored.
    fn check_layer_types(&self, config: &DecoderConfig) -> Result<()> {
        let expected = if config.sliding_window.is_some() { "sliding_attention" } else { "full_attention" };
        match self.get("layer_types") {
            None => Ok(()),
            Some(Value::Array(types)) if types.iter().all(|one| one == expected) => Ok(()),
            Some(_) => {
                let window = config.sliding_window.map_or("none".to_string(), |window| window.to_string());
                let supported = format!("{expected:?} for every layer is, the window being {window}");
                Err(self.unsupported("layer_types", &supported))
            }
        }
    }

    fn check_sizes(&self, config: &DecoderConfig) -> Result<()> {
        let projected = (config.heads + 2 * config.kv_heads).saturating_mul(config.head_dim);
        for (what, width) in [
            ("vocab_size * hidden_size", config.vocabulary),
            ("2 * intermediate_size * hidden_size", 2 * config.intermediate),
            ("(num_attention_heads + 2 * num_key_value_heads) * head_dim * hidden_size", projected),
        ] {
            let size = config.hidden.saturating_mul(width);
            if size > LARGEST {
                return Err(Error::file(&self.path, format!("{what} = {size}: expected at most {LARGEST}")));
            }
        }
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.count_or_none(key)?.ok_or_else(|| self.wrong(key, COUNT, None))
    }

    fn count_or_none(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(count) if (1..1 << 31).contains(&count) => Ok(Some(count as usize)),
            _ => Err(self.wrong(key, COUNT, Some(value))),
        }
    }

    fn positive(&self, key: &str) -> Result<f64> {
        self.positive_or_none(key)?.ok_or_else(|| self.wrong(key, POSITIVE, None))
    }

    fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.positive_or_none(key)?.unwrap_or(default))
    }

    fn positive_or_none(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        positive(value).map(Some).ok_or_else(|| self.wrong(key, POSITIVE, Some(value)))
    }

    fn positives(&self, key: &str) -> Result<Vec<f64>> {
        let numbers = match self.get(key) {
            Some(Value::Array(list)) => list.iter().map(positive).collect::<Option<_>>(),
            _ => None,
        };
        numbers.ok_or_else(|| self.wrong(key, "a list of numbers above 0", self.get(key)))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", Some(value)))
    }

    fn wrong(&self, key: &str, expected: &str, found: Option<&Value>) -> Error {
        let found = found.map_or("nothing".to_string(), Value::to_string);
        Error::file(&self.path, format!("{}{key}: expected {expected}, found {found}", self.prefix))
    }

    fn unsupported(&self, key: &str, supported: &str) -> Error {
        ErrorKind::Unsupported {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            value: self.get(key).map_or("null".to_string(), Value::to_string),
            supported: supported.to_string(),
        }
        .into()
    }
}

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| *number > 0.0)
}

#[cfg(test)]
#[path = "hf_config_tests.rs"]
mod tests;
