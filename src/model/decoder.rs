//! One decoder for all families.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Once},
};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    behind,
    block::Block,
    cache::KvCache,
    causal_lm::{CausalLm, Hidden, Input, Last, Parameter, TrainableLm},
    config::{DecoderConfig, NormKind},
    earlier::{Earlier, ReadText},
    fingerprint,
    generate::{self, Generation},
    head,
    linear::{Linear, LinearMode},
    lora::LoraConfig,
    norm::RmsNorm,
    perturbation::Perturbation,
    plan::Plan,
    product,
    rope::Rope,
    shared::Shared,
    weights::{FolderWeights, RandomWeights, WeightSource},
};
use crate::{Batch, Error, Layout, Result, RowLayout, error::Context, files, tensor::is_recorded};

/// What rows share is worth a row of its own where it spares one token in so many: attention then has more padding, and never its
/// causal kernel.
const WORTH_SHARING: usize = 10;

/// A decoder-only transformer of one of the supported families ([`super::config::Family`]), with an optional LoRA adapter on
/// its linear layers.
///
/// The dtype policy: weights and activations are in the compute dtype; norms, angles and softmax over the vocabulary are
/// computed in float32 at least; adapters are kept in float32 and cast for a pass.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    /// config.json as it was read, written back on export.
    pub(super) source_config: Value,
    /// `[vocabulary, hidden]`.
    pub(super) embedding: Tensor,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: RmsNorm,
    /// `[vocabulary, hidden]`; none where the embedding is the head too.
    pub(super) head: Option<Tensor>,
    pub(super) lora: Option<LoraConfig>,
    rope: Rope,
    kind: Kind,
    /// Of the message that a text is longer than the model was made for: once is enough.
    beyond: Arc<Once>,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Brings each tensor of a source to a dtype and device.
struct Placed<'a> {
    source: &'a mut dyn WeightSource,
    kind: Kind,
    device: Device,
}

impl WeightSource for Placed<'_> {
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.source.get(name, shape)?.f_to_device(self.device)?.f_to_kind(self.kind)?)
    }
}

impl Decoder {
    /// Loads a Hugging Face model folder: config.json and model.safetensors or shards with their index. The weights are
    /// memory-mapped meanwhile: no other process may change or shorten the files until this returns.
    ///
    /// # Errors
    /// If a file is missing, truncated or not what it should be, a tensor is missing, too many or of the wrong shape, or
    /// the config asks for something that is not implemented. Each message names the file, and the key or tensor.
    pub fn load(folder: impl AsRef<Path>, kind: Kind, device: Device) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let json = files::read_json(&path)?;
        let config = DecoderConfig::from_json(&json, path)?;
        let mut weights = FolderWeights::open(folder)?;
        let decoder = Self::build(config, json, &mut weights, kind, device)
            .context(|| format!("loading the model of {}", folder.display()))?;
        if decoder.head.is_none() && weights.has(HEAD) {
            decoder.check_copy_of_head(&mut weights)?;
        }
        // Older exports carry the rotary frequencies.
        weights.finish(|name| name.ends_with(".inv_freq"))?;
        Ok(decoder)
    }

    /// Older exports carry a copy of a tied head. Of another head readers differ: some drop it, others do not tie.
    fn check_copy_of_head(&self, weights: &mut FolderWeights) -> Result<()> {
        let table = self.embedding.size();
        let (head, embedding) = (weights.get(HEAD, &table)?, weights.get(EMBEDDING, &table)?);
        if head.f_equal(&embedding)? {
            return Ok(());
        }
        let message = format!(
            "tie_word_embeddings is true, and {HEAD:?} is another matrix than {EMBEDDING:?}; set it to false, or remove {HEAD:?}"
        );
        Err(weights.refused(message))
    }

    /// A decoder with random weights of standard deviation `deviation`, from the value of a `config.json`.
    ///
    /// # Errors
    /// If the config asks for something that is not implemented.
    pub fn random(json: Value, deviation: f32, seed: u64, kind: Kind, device: Device) -> Result<Self> {
        let config = DecoderConfig::from_json(&json, PathBuf::from("config.json"))?;
        let norm = if config.norm == NormKind::UnitOffset { 0.0 } else { 1.0 };
        Self::build(config, json, &mut RandomWeights { seed, deviation, norm }, kind, device)
    }

    fn build(
        config: DecoderConfig,
        source_config: Value,
        source: &mut dyn WeightSource,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let source = &mut Placed { source, kind, device };
        let table = [config.vocabulary as i64, config.hidden as i64];
        let embedding = source.get(EMBEDDING, &table)?;
        let blocks = (0..config.layers).map(|index| Block::load(source, index, &config)).collect::<Result<_>>()?;
        let norm = RmsNorm::load(source, "model.norm".into(), config.hidden, config.norm, config.norm_epsilon)?;
        let head = if config.tied_head { None } else { Some(source.get(HEAD, &table)?) };
        let rope = Rope::new(&config.rope);
        let beyond = Arc::new(Once::new());
        Ok(Self { config, source_config, embedding, blocks, norm, head, lora: None, rope, kind, beyond })
    }

    /// The decoder's shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The adapter's settings, if there is one.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Trains every weight, without an adapter: for small models and for supervised training from random weights.
    ///
    /// # Errors
    /// If the compute dtype is not float32 or float64 (updates as small as a learning rate of 2e-4 makes them are lost in
    /// bfloat16), or there is an adapter.
    pub fn train_all_weights(&mut self) -> Result<()> {
        if !matches!(self.kind, Kind::Float | Kind::Double) {
            return Err(Error::setting("dtype", format!("{:?}", self.kind), "float32 or float64 to train all weights"));
        }
        if self.lora.is_some() {
            return Err(Error::mismatch("model to train all weights of", "one without adapter", "one with"));
        }
        for Parameter { tensor, .. } in self.weights() {
            let _ = tensor.f_set_requires_grad(true)?;
        }
        Ok(())
    }

    /// Ends the training of all weights: none of them gets a gradient from now on.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn freeze_all_weights(&mut self) -> Result<()> {
        for Parameter { tensor, .. } in self.weights() {
            let _ = tensor.f_set_requires_grad(false)?;
        }
        Ok(())
    }

    /// All weights of the model itself, under their Hugging Face names.
    pub(super) fn weights(&self) -> Vec<Parameter> {
        let mut weights = vec![(EMBEDDING.to_string(), &self.embedding)];
        for block in &self.blocks {
            for norm in block.norms() {
                weights.push((format!("{}.weight", norm.name), &norm.weight));
            }
        }
        for linear in self.linears() {
            weights.push((format!("{}.weight", linear.name), &linear.weight));
            weights.extend(linear.bias.iter().map(|bias| (format!("{}.bias", linear.name), bias)));
        }
        weights.push((format!("{}.weight", self.norm.name), &self.norm.weight));
        weights.extend(self.head.iter().map(|head| (HEAD.to_string(), head)));
        weights.into_iter().map(|(name, tensor)| Parameter { name, tensor: tensor.shallow_clone() }).collect()
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.blocks.iter_mut().flat_map(Block::linears_mut)
    }

    /// The matrix `[vocabulary, hidden]` that hidden states meet.
    fn head_weight(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Un-scaled embeddings as they enter block 0, in the compute dtype.
    fn enter(&self, embeddings: &Tensor) -> Result<Tensor> {
        let x = embeddings.f_to_kind(self.kind)?;
        if !self.config.scales_embeddings {
            return Ok(x);
        }
        // The reference rounds the factor itself to the compute dtype: 45.25 for 2048 in bf16.
        let factor = Tensor::from((self.config.hidden as f64).sqrt()).f_to_kind(self.kind)?.f_to_device(x.device())?;
        Ok(x.f_mul(&factor)?)
    }

    fn run(&self, input: &Input, mut earlier: Earlier) -> Result<Hidden> {
        let layout = input.layout();
        let (positions, lengths) = positions(layout, &earlier.lengths(layout.rows().len()));
        self.warn_beyond(lengths.iter().copied().max().unwrap_or(0));
        let device = self.device();
        let rotation = self.rope.rotation(&positions, &lengths, self.kind, device)?;
        let window = self.config.sliding_window;
        let plan = Plan::new(layout, &mut earlier, window, device)?;
        let mode = LinearMode { adapter: input.pass().adapter, dropout: input.pass().dropout };
        let last = self.last_of(input, &earlier);
        let partial = |asking: &Vec<usize>| Plan::partial(layout, asking, &earlier, window, device);
        let last_plan = last.as_ref().map(partial).transpose()?;
        let mut x = self.enter(input.embeddings())?;
        let mut tapped: Vec<Option<Tensor>> = input.pass().taps.iter().map(|_| None).collect();
        for (index, block) in self.blocks.iter().enumerate() {
            for addition in input.additions().iter().filter(|addition| addition.block == index) {
                x = x.f_index_add(0, &addition.tokens, &addition.values.f_to_kind(self.kind)?)?;
            }
            let plan = last_plan.as_ref().filter(|_| index + 1 == self.blocks.len()).unwrap_or(&plan);
            x = block.forward(&x, &rotation, plan, &mut earlier, mode).context(|| format!("running block {index}"))?;
            for (tap, slot) in input.pass().taps.iter().zip(&mut tapped) {
                if *tap == index {
                    *slot = Some(x.shallow_clone());
                }
            }
        }
        if let Earlier::Cached(cache) = earlier {
            cache.advance(&layout.lengths());
        }
        let tapped = tapped.into_iter().collect::<Option<Vec<_>>>();
        let tapped = tapped.ok_or_else(|| {
            Error::mismatch(
                "tapped blocks",
                format!("each < {}", self.blocks.len()),
                format!("{:?}", input.pass().taps),
            )
        })?;
        Ok(Hidden { last: self.norm.forward(&x)?, last_of: last, tapped })
    }

    /// What the rows share, where computing it once gives the same and is worth it: dropout draws for every row anew, and where
    /// rotary factors depend on a text's length, they must be those of the shared tokens alone.
    fn shared(&self, input: &Input) -> Option<Shared> {
        let (layout, tokens) = (input.layout(), input.shared());
        let longest = layout.rows().iter().map(RowLayout::path_len).max().unwrap_or(0);
        let drops = input.pass().dropout && self.linears().any(Linear::drops);
        let same = tokens > 0 && !drops && !self.switches_between(tokens, longest);
        let (rows, spared) = (layout.rows().len(), layout.rows().len().saturating_sub(1) * tokens);
        (same && rows > 2 && spared * WORTH_SHARING >= layout.tokens()).then(|| Shared::new(layout, tokens))
    }

    /// The tokens that alone must come out of the last block, packed indices; `None`: all.
    fn last_of(&self, input: &Input, earlier: &Earlier) -> Option<Vec<usize>> {
        let cached = matches!(earlier, Earlier::Cached(_));
        let whole = input.pass().last == Last::All || cached || self.blocks.is_empty();
        let tapped = input.pass().taps.iter().any(|tap| tap + 1 == self.blocks.len());
        let predictors = if whole || tapped { Vec::new() } else { input.layout().predictors() };
        Some(predictors).filter(|predictors| !predictors.is_empty())
    }

    /// Says in the log, once, that a text is longer than the model was made for.
    fn warn_beyond(&self, longest: usize) {
        let max_positions = self.config.max_positions;
        if longest > max_positions {
            self.beyond.call_once(|| {
                tracing::warn!(tokens = longest, max_positions, "a text is longer than the model was made for");
            });
        }
    }

    pub(super) fn new_cache(&self, rows: usize) -> Result<KvCache> {
        KvCache::new(&self.config, rows, self.kind, self.device())
    }

    /// Whether a text of one of these lengths has other rotary factors once a token is added.
    pub(super) fn switches_after(&self, lengths: &[usize]) -> bool {
        self.rope.switch().is_some_and(|longest| lengths.contains(&longest))
    }

    /// Whether a text of the one length has other rotary factors than one of the other, which is longer.
    pub(super) fn switches_between(&self, short: usize, long: usize) -> bool {
        self.rope.switch().is_some_and(|longest| short <= longest && longest < long)
    }

    /// Final hidden states of new tokens, whose keys and values are added to the cache. Not for gradients.
    pub(super) fn hidden_cached(&self, input: &Input, cache: &mut KvCache) -> Result<Hidden> {
        let _guard = tch::no_grad_guard();
        self.run(input, Earlier::Cached(cache))
    }

    /// Final hidden states of rows that stand behind so many tokens each of a text.
    pub(super) fn hidden_behind(&self, input: &Input, text: &ReadText, read: Vec<usize>) -> Result<Hidden> {
        self.run(input, Earlier::Text { text, read })
    }
}

/// For each token its position, and the length of the text that it is part of, where row r already has `read[r]` tokens.
fn positions(layout: &Layout, read: &[usize]) -> (Vec<i64>, Vec<usize>) {
    let mut positions = layout.positions();
    let mut lengths = Vec::with_capacity(positions.len());
    for (row, read) in layout.rows().iter().zip(read) {
        for token in row.tokens() {
            positions[token] += *read as i64;
            lengths.push(row.path_len() + read);
        }
    }
    (positions, lengths)
}

impl CausalLm for Decoder {
    fn layers(&self) -> usize {
        self.blocks.len()
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    fn hidden(&self, input: &Input) -> Result<Hidden> {
        if input.read().is_some() {
            let what = "rows behind a part of a text";
            return Err(Error::mismatch(what, "a model that has read one", "one that has not"));
        }
        let Some(shared) = self.shared(input) else { return self.run(input, Earlier::Nothing) };
        shared.whole(self.run(&shared.input(input)?, Earlier::FirstRow(input.shared()))?)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        product::linear(hidden, self.head_weight(), None)
    }

    fn log_odds(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let head = self.head_weight();
        if is_recorded(head)? {
            return head::log_odds(self, hidden, ids, head::CHUNK);
        }
        head::log_odds_of_linear(head, hidden, ids, self.master_kind(), head::vocabulary_chunk(self.device()))
    }

    fn generate(
        &self,
        prompts: &Batch,
        perturbation: Option<&Perturbation>,
        settings: &Generation,
    ) -> Result<Vec<Vec<i64>>> {
        generate::with_cache(self, prompts, perturbation, settings)
    }

    fn behind<'a>(&'a self, text: &[i64]) -> Result<Box<dyn CausalLm + 'a>> {
        behind::decoder(self, text)
    }

    fn frozen(&self, dropout: bool) -> Result<Option<Box<dyn CausalLm + '_>>> {
        let _guard = tch::no_grad_guard();
        Ok(Some(Box::new(Self {
            config: self.config.clone(),
            source_config: Value::Null,
            embedding: self.embedding.f_detach()?,
            blocks: self.blocks.iter().map(|block| block.frozen(!dropout)).collect::<Result<_>>()?,
            norm: self.norm.frozen()?,
            head: self.head.as_ref().map(Tensor::f_detach).transpose()?,
            lora: None,
            rope: self.rope.clone(),
            kind: self.kind,
            beyond: self.beyond.clone(),
        })))
    }
}

impl TrainableLm for Decoder {
    /// The tensors that training changes, in a fixed order: the adapter's factors, or all weights, or none.
    fn parameters(&self) -> Vec<Parameter> {
        let of_adapter = self.linears().flat_map(|linear| {
            linear.lora.iter().flat_map(|lora| {
                let parameter = |factor: &str, tensor: &Tensor| Parameter {
                    name: format!("base_model.model.{}.{factor}.weight", linear.name),
                    tensor: tensor.shallow_clone(),
                };
                [parameter("lora_A", &lora.a), parameter("lora_B", &lora.b)]
            })
        });
        of_adapter.chain(self.weights()).filter(|parameter| parameter.tensor.requires_grad()).collect()
    }

    fn describe(&self) -> String {
        match &self.lora {
            Some(lora) => format!("{lora:?}"),
            None => "all weights".to_string(),
        }
    }

    fn has_adapter(&self) -> bool {
        self.lora.is_some()
    }

    fn fingerprint(&self) -> Result<String> {
        fingerprint::of(&self.weights())
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
