//! What an attack or a loss needs of a model, and no more.

use tch::{Device, Kind, Tensor};

use super::{
    behind::Prepended,
    fingerprint,
    generate::{self, Generation},
    head,
    perturbation::Perturbation,
};
use crate::{Batch, Error, Layout, Result, Targets, tensor};

/// A causal language model that reads embeddings.
///
/// Object safe, and bound by neither `Send` nor `Sync`: attacks and losses take `&dyn CausalLm`. Five methods are
/// required; everything else is built on them, and a model overrides it only to be faster.
///
/// # Example
///
/// A bigram model: the hidden state of a token is its embedding, so the next token depends on the current one alone.
///
/// ```
/// use advtrain::{CausalLm, Hidden, Input, Result, tch::{Device, Kind, Tensor}};
///
/// struct Bigram {
///     embedding: Tensor, // [vocabulary, hidden]
///     head: Tensor,      // [vocabulary, hidden]
/// }
///
/// impl CausalLm for Bigram {
///     fn layers(&self) -> usize {
///         0
///     }
///     fn kind(&self) -> Kind {
///         Kind::Float
///     }
///     fn embedding(&self) -> &Tensor {
///         &self.embedding
///     }
///     fn hidden(&self, input: &Input) -> Result<Hidden> {
///         Ok(Hidden { last: input.embeddings().shallow_clone(), last_of: None, tapped: Vec::new() })
///     }
///     fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
///         Ok(hidden.f_matmul(&self.head.f_tr()?)?)
///     }
/// }
///
/// let model = Bigram {
///     embedding: Tensor::randn([5, 3], (Kind::Float, Device::Cpu)),
///     head: Tensor::randn([5, 3], (Kind::Float, Device::Cpu)),
/// };
/// assert_eq!(model.hidden_size(), 3);
/// ```
pub trait CausalLm {
    /// How many blocks: perturbations can be added to what enters each of them.
    fn layers(&self) -> usize;

    /// The dtype that the model computes in.
    fn kind(&self) -> Kind;

    /// The embedding table `[vocabulary, hidden]`, un-scaled, in any floating dtype.
    fn embedding(&self) -> &Tensor;

    /// The final hidden states (behind the last norm) of every token, and the tapped ones.
    ///
    /// # Errors
    /// If the shapes of the input do not fit, or libtorch fails.
    fn hidden(&self, input: &Input) -> Result<Hidden>;

    /// The logits `[n, vocabulary]` that final hidden states `[n, hidden]` give.
    ///
    /// # Errors
    /// If libtorch fails.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// The log-odds log(p / (1 - p)) `[n]` of ids `[n]` (int64) given the hidden states `[n, hidden]` of the tokens before them;
    /// float32 at least, differentiable towards `hidden`. The vocabulary's logits exist only in part at a time. What
    /// [`CausalLm::log_probs`] and [`CausalLm::log_complements`] are made of, and what a model overrides to make them faster.
    ///
    /// # Errors
    /// If the shapes differ in n, or libtorch fails.
    fn log_odds(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        head::log_odds(self, hidden, ids, head::CHUNK)
    }

    /// The log-probabilities `[n]` of ids, as [`CausalLm::log_odds`] is given them.
    ///
    /// # Errors
    /// As [`CausalLm::log_odds`].
    fn log_probs(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        Ok(self.log_odds(hidden, ids)?.f_log_sigmoid()?)
    }

    /// log(1 - p) `[n]` of ids, as [`CausalLm::log_odds`] is given them; it and its gradient hold where p rounds to 1.
    ///
    /// # Errors
    /// As [`CausalLm::log_odds`].
    fn log_complements(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        Ok(self.log_odds(hidden, ids)?.f_neg()?.f_log_sigmoid()?)
    }

    /// KL(reference || this) `[n]` in nats between the next-token distributions of two sets of hidden states `[n, hidden]`;
    /// float32 at least, differentiable towards `hidden` and not towards `reference`.
    ///
    /// # Errors
    /// If the shapes differ, or libtorch fails.
    fn kl(&self, hidden: &Tensor, reference: &Tensor) -> Result<Tensor> {
        head::kl(self, hidden, reference, head::CHUNK)
    }

    /// Continues prompts (the rows of a batch without continuations), one list of new ids per row.
    ///
    /// # Errors
    /// If a row has a continuation, a setting is out of range, or libtorch fails.
    fn generate(
        &self,
        prompts: &Batch,
        perturbation: Option<&Perturbation>,
        settings: &Generation,
    ) -> Result<Vec<Vec<i64>>> {
        generate::without_cache(self, prompts, perturbation, settings)
    }

    /// The same model, having read a text of these ids: every row that it is then given stands behind that text, or behind so
    /// many tokens of it as [`Input::behind`] says. Differentiable towards the rows. A decoder reads the text once and shares its
    /// keys and values among all rows.
    ///
    /// # Errors
    /// If an id is not of the vocabulary, or libtorch fails.
    fn behind<'a>(&'a self, text: &[i64]) -> Result<Box<dyn CausalLm + 'a>> {
        Ok(Box::new(Prepended::new(self, text)?))
    }

    /// The same model with weights that no gradient reaches, made once for many passes; `None` where the model itself serves.
    /// A decoder that computes in float32 or float64 merges its adapter into a scratch copy here, unless `dropout` asks for
    /// the adapter's own path; in half precision the adapter always keeps it, since merging would round small changes away.
    /// With [`Adapter::Off`] it is the original model either way.
    ///
    /// # Errors
    /// If libtorch fails.
    fn frozen(&self, dropout: bool) -> Result<Option<Box<dyn CausalLm + '_>>> {
        let _ = dropout;
        Ok(None)
    }

    /// The device of the weights.
    fn device(&self) -> Device {
        self.embedding().device()
    }

    /// Rows of the embedding table.
    fn vocabulary(&self) -> i64 {
        self.embedding().size()[0]
    }

    /// Length of a hidden state.
    fn hidden_size(&self) -> i64 {
        self.embedding().size()[1]
    }

    /// The dtype of perturbations and losses: float64 where the model computes in it, else float32.
    fn master_kind(&self) -> Kind {
        if self.kind() == Kind::Double { Kind::Double } else { Kind::Float }
    }

    /// Un-scaled embeddings `[tokens, hidden]` of ids `[tokens]`, in [`CausalLm::master_kind`].
    ///
    /// Ids on a GPU must be rows of the table, as those of a batch are where [`Input::of_batch`] has checked them: CUDA
    /// answers others with an assertion that ends the device's use in this process.
    ///
    /// # Errors
    /// If an id on the CPU is outside the table.
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(self.embedding(), ids, -1, false, false)?.f_to_kind(self.master_kind())?)
    }

    /// Mean L2 norm of the rows of the embedding table: what a relative epsilon is relative to (method of Xhonneux et al.,
    /// section 4).
    ///
    /// # Errors
    /// If libtorch fails.
    fn mean_embedding_norm(&self) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let norms = self.embedding().f_to_kind(self.master_kind())?.f_norm_scalaropt_dim(2, [1], false)?;
        Ok(f64::try_from(norms.f_mean(Kind::Double)?)?)
    }
}

/// A model that can be trained.
pub trait TrainableLm: CausalLm {
    /// The tensors that training changes, in float32 or float64, in a fixed order.
    fn parameters(&self) -> Vec<Parameter>;

    /// How the model is trained, in a text: what of the adapter's settings the trained tensors do not show. A checkpoint keeps
    /// it, and a run goes on only with the same. Empty by default.
    fn describe(&self) -> String {
        String::new()
    }

    /// Whether [`Adapter::Off`] gives the original model while this one is trained.
    fn has_adapter(&self) -> bool;

    /// A text that differs between models with different weights (an adapter aside), for caches of what they computed.
    ///
    /// # Errors
    /// If libtorch fails.
    fn fingerprint(&self) -> Result<String>;

    /// A text that differs between models whose trained tensors hold different numbers. Of a model that no update was made
    /// on it tells where its training begins; a checkpoint keeps that, and a run goes on only with the same.
    ///
    /// # Errors
    /// If libtorch fails.
    fn trained_fingerprint(&self) -> Result<String> {
        fingerprint::of(&self.parameters())
    }
}

/// A trained tensor and its name.
#[derive(Debug)]
pub struct Parameter {
    /// The Hugging Face or PEFT name.
    pub name: String,
    /// The tensor itself, not a copy.
    pub tensor: Tensor,
}

/// Whether the adapter takes part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adapter {
    /// The model as it is trained.
    #[default]
    On,
    /// The original model: the reference of C-AdvIPO.
    Off,
}

/// Of which tokens the final hidden states are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Last {
    /// Of all.
    #[default]
    All,
    /// At least of those that predict a target: a model may leave the others out, and so most of its last block.
    Predictors,
}

/// How a pass is made. The default: adapter on, no dropout, nothing tapped, all tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass<'a> {
    /// Whether the adapter takes part.
    pub adapter: Adapter,
    /// Whether the adapter's dropout is active; its draws come from libtorch's generator.
    pub dropout: bool,
    /// The blocks whose output is wanted too.
    pub taps: &'a [usize],
    /// Of which tokens the final hidden states are wanted.
    pub last: Last,
}

/// Values added to what enters a block.
#[derive(Debug)]
pub struct Addition {
    /// The block, from 0.
    pub block: usize,
    /// Packed indices of the tokens `[n]`, int64.
    pub tokens: Tensor,
    /// What is added `[n, hidden]`.
    pub values: Tensor,
}

/// What a model reads: embeddings, where they stand, and how the pass is made.
#[derive(Debug)]
pub struct Input<'a> {
    embeddings: Tensor,
    layout: &'a Layout,
    additions: Vec<Addition>,
    pass: Pass<'a>,
    read: Option<Vec<usize>>,
    shared: usize,
}

impl<'a> Input<'a> {
    /// The tokens of a batch, with a perturbation added where there is one.
    ///
    /// # Errors
    /// If the batch has a token id that the model's vocabulary lacks, the perturbation names tokens that the batch lacks or
    /// blocks that the model lacks, or libtorch fails.
    pub fn of_batch<M: CausalLm + ?Sized>(
        model: &M,
        batch: &'a Batch,
        perturbation: Option<&Perturbation>,
        pass: Pass<'a>,
    ) -> Result<Self> {
        check_ids(batch, model.vocabulary())?;
        let mut input = Self::of_embeddings(model.embed(batch.ids())?, batch.layout(), pass)?;
        match perturbation {
            Some(perturbation) => perturbation.add_to(model, &mut input)?,
            None => input.shared = shared(batch),
        }
        Ok(input)
    }

    /// Un-scaled embeddings `[tokens, hidden]` in the packed order of a layout.
    ///
    /// # Errors
    /// If the number of tokens differs from the layout's.
    pub fn of_embeddings(embeddings: Tensor, layout: &'a Layout, pass: Pass<'a>) -> Result<Self> {
        if embeddings.dim() != 2 {
            return Err(Error::mismatch("embeddings", "[tokens, hidden]", format!("{:?}", embeddings.size())));
        }
        layout.check_tokens("embeddings", &embeddings)?;
        Ok(Self { embeddings, layout, additions: Vec::new(), pass, read: None, shared: 0 })
    }

    /// Lets each row stand behind so many first tokens of the text that the model has read ([`CausalLm::behind`]); unless told,
    /// behind all of it.
    ///
    /// # Errors
    /// If there is not one number for each row.
    pub fn behind(self, read: Vec<usize>) -> Result<Self> {
        let rows = self.layout.rows().len();
        if read.len() != rows {
            return Err(Error::mismatch("rows that stand behind a part of a text", rows, read.len()));
        }
        Ok(Self { read: Some(read), shared: 0, ..self })
    }

    /// Behind how many tokens of a text each row stands, if that was told.
    pub fn read(&self) -> Option<&[usize]> {
        self.read.as_deref()
    }

    /// How many first tokens all rows are known to have in common, at most all but one of the shortest prompt, with nothing added to
    /// them. Without dropout, and where nothing depends on how long a text is, their hidden states are the same in every row too, so
    /// that a model may compute them once.
    pub fn shared(&self) -> usize {
        self.shared
    }

    /// Un-scaled embeddings with the perturbation in them `[tokens, hidden]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// Where the tokens stand.
    pub fn layout(&self) -> &'a Layout {
        self.layout
    }

    /// What is added inside the model.
    pub fn additions(&self) -> &[Addition] {
        &self.additions
    }

    /// How the pass is made.
    pub fn pass(&self) -> Pass<'a> {
        self.pass
    }

    pub(super) fn set_embeddings(&mut self, embeddings: Tensor) {
        self.embeddings = embeddings;
    }

    pub(super) fn push(&mut self, addition: Addition) {
        self.additions.push(addition);
    }
}

/// Looks at the examples' own ids, which are in the host's memory, and so waits for no device.
fn check_ids(batch: &Batch, vocabulary: i64) -> Result<()> {
    for example in batch.examples() {
        let continuations = example.continuations().iter().flat_map(|continuation| continuation.tokens.ids());
        if let Some(id) = example.prompt().ids().iter().chain(continuations).find(|id| !(0..vocabulary).contains(*id)) {
            let message = format!("token id {id}: the model's vocabulary has ids from 0 to {}", vocabulary - 1);
            return Err(Error::example(example.id(), message));
        }
    }
    Ok(())
}

fn shared(batch: &Batch) -> usize {
    let prompts: Vec<&[i64]> = batch.examples().iter().map(|example| example.prompt().ids()).collect();
    let shortest = prompts.iter().map(|prompt| prompt.len()).min().unwrap_or(0);
    let same = |at: &usize| prompts.iter().all(|prompt| prompt[*at] == prompts[0][*at]);
    (0..shortest.saturating_sub(1)).take_while(same).count()
}

/// What a model gives back.
#[derive(Debug)]
pub struct Hidden {
    /// Final hidden states, behind the last norm `[tokens, hidden]`, in the model's dtype.
    pub last: Tensor,
    /// The tokens that `last` is of, packed indices, ascending; `None`: all of them, in order.
    pub last_of: Option<Vec<usize>>,
    /// The output of each tapped block `[tokens, hidden]`, in the order of [`Pass::taps`].
    pub tapped: Vec<Tensor>,
}

impl Hidden {
    /// The final hidden states `[targets, hidden]` of the tokens that predict these targets.
    ///
    /// # Errors
    /// If the pass was not asked for one of them, or libtorch fails.
    pub fn predicting(&self, targets: &Targets) -> Result<Tensor> {
        let Some(tokens) = &self.last_of else { return Ok(self.last.f_index_select(0, &targets.predictors)?) };
        let place = |predictor: usize| match tokens.binary_search(&predictor) {
            Ok(place) => Ok(place as i64),
            Err(_) => Err(Error::mismatch("final hidden states", format!("those of token {predictor} too"), "others")),
        };
        let places = targets.list.iter().map(|target| place(target.predictor)).collect::<Result<Vec<_>>>()?;
        Ok(self.last.f_index_select(0, &tensor::index(&places, self.last.device())?)?)
    }
}
