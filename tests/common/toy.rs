//! Shared by the tests of attacks and training: a tiny decoder in float64, a bigram model, and rows for them.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use advtrain::{
    AdvUlLoss, AttackObjective, AttackOutcome, AttackRunner, AttackSettings, Batch, CausalLm, Continuation,
    ContinuationKind, Decoder, Draws, EmbeddingAttack, Example, Hidden, Input, LoraConfig, LossInput, Observer, Pass,
    Perturbation, Result, RobustLoss, TargetCrossEntropy, Term, TokenKind, Tokens, TrainableLm, UpdateMetrics,
    tch::{Device, Kind, Tensor},
};

pub const HIDDEN: i64 = 8;
pub const VOCABULARY: i64 = 24;

/// Two blocks of Llama, float64.
pub fn decoder() -> Decoder {
    decoder_of_seed(3)
}

/// The same with other random weights.
pub fn decoder_of_seed(seed: u64) -> Decoder {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2
    });
    Decoder::random(json, 0.5, seed, Kind::Double, Device::Cpu).unwrap()
}

/// The same with an adapter.
pub fn with_lora(dropout: f64) -> Decoder {
    let mut model = decoder();
    model.add_lora(&lora(dropout), 5).unwrap();
    model
}

pub fn lora(dropout: f64) -> LoraConfig {
    LoraConfig { rank: 2, alpha: 4.0, dropout, ..LoraConfig::default() }
}

/// The same with an adapter that has learnt something, so that it is not the original model.
pub fn adapted(dropout: f64) -> Decoder {
    let model = with_lora(dropout);
    let _guard = advtrain::tch::no_grad_guard();
    for mut one in model.parameters().into_iter().filter(|one| one.name.contains("lora_B")) {
        let wave = (Tensor::arange(one.tensor.numel() as i64, (Kind::Double, Device::Cpu)) * 0.9).sin() * 0.4;
        one.tensor.copy_(&wave.view_as(&one.tensor));
    }
    model
}

/// The same with every weight in training.
pub fn all_weights() -> Decoder {
    let mut model = decoder();
    model.train_all_weights().unwrap();
    model
}

fn answer(kind: ContinuationKind, ids: Vec<i64>) -> Continuation {
    Continuation { kind, tokens: Tokens::of_kind(ids, TokenKind::Target) }
}

fn prompt(number: usize) -> Tokens {
    let user: Vec<i64> = (0..1 + number % 3).map(|at| ((5 * number + 7 * at) % VOCABULARY as usize) as i64).collect();
    let mut tokens = Tokens::of_kind(vec![1, 2], TokenKind::Template);
    tokens.extend(&Tokens::of_kind(user, TokenKind::User));
    tokens.extend(&Tokens::of_kind(vec![3], TokenKind::Template));
    tokens
}

/// Row `number` with a harmful and a safe answer; prompts and answers differ in length and content.
pub fn robust(number: usize) -> Example {
    let harmful = (0..1 + number % 4).map(|at| ((3 * number + 11 * at) % VOCABULARY as usize) as i64).collect();
    let answers = vec![answer(ContinuationKind::Harmful, harmful), answer(ContinuationKind::Safe, vec![4, 0, 9])];
    Example::new(format!("r{number}"), prompt(number), answers).unwrap()
}

/// Row `number` with a useful answer.
pub fn useful(number: usize) -> Example {
    let ids = (0..2 + number % 2).map(|at| ((2 * number + 5 * at) % VOCABULARY as usize) as i64).collect();
    Example::new(format!("u{number}"), prompt(number + 1), vec![answer(ContinuationKind::Utility, ids)]).unwrap()
}

pub fn batch(examples: Vec<Example>) -> Batch {
    Batch::new(examples, Device::Cpu).unwrap()
}

/// One attack on a batch, by a runner of its own.
pub fn attacked(
    attack: &mut dyn EmbeddingAttack,
    objective: &mut dyn AttackObjective,
    settings: AttackSettings,
    model: &dyn CausalLm,
    batch: &Batch,
) -> Result<AttackOutcome> {
    let mut runner = AttackRunner::new(settings, attack, model)?;
    runner.run(attack, objective, model, batch, Draws { seed: 7, epoch: 0 })
}

/// The mean cross-entropy of each row's continuation of a kind, differentiable.
pub fn cross_entropy(
    model: &dyn CausalLm,
    batch: &Batch,
    kind: ContinuationKind,
    perturbation: Option<&Perturbation>,
) -> Tensor {
    let rows = batch.select(&[kind]).unwrap().unwrap();
    let input = Input::of_batch(model, &rows.batch, perturbation, Pass::default()).unwrap();
    let hidden = model.hidden(&input).unwrap();
    TargetCrossEntropy.values(model, &rows.batch, kind, &hidden).unwrap()
}

/// The numbers of a tensor.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).reshape([-1])).unwrap()
}

/// The ids of a prompt, and how many places of it were perturbed.
pub type Seen = (Vec<i64>, usize);

/// C-AdvUL, and a note of the prompts and perturbed places that it met.
pub struct Watched {
    pub loss: AdvUlLoss,
    pub seen: Arc<Mutex<Vec<Seen>>>,
}

impl RobustLoss for Watched {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let places = input.perturbation.map_or(0, |one| one.places().len());
        let prompt = input.batch.examples()[0].prompt().ids().to_vec();
        self.seen.lock().unwrap().push((prompt, places));
        self.loss.terms(input)
    }
}

/// Raises a flag after an update.
pub struct StopAfter(pub usize, pub Arc<AtomicBool>);

impl Observer for StopAfter {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        self.1.store(metrics.update >= self.0, Ordering::Relaxed);
        Ok(())
    }
}

/// A model whose next token depends on the current one alone: its logits are the embedding times a matrix.
pub struct Bigram {
    pub embedding: Tensor, // [vocabulary, hidden]
    pub head: Tensor,      // [vocabulary, hidden]
}

impl Bigram {
    pub fn new() -> Self {
        let spread = |scale: f64, step: f64| {
            let values: Vec<f64> = (0..VOCABULARY * HIDDEN).map(|at| scale * (step * at as f64).sin()).collect();
            Tensor::from_slice(&values).view([VOCABULARY, HIDDEN])
        };
        Self { embedding: spread(0.5, 1.7), head: spread(0.8, 0.9) }
    }
}

impl CausalLm for Bigram {
    fn layers(&self) -> usize {
        0
    }
    fn kind(&self) -> Kind {
        Kind::Double
    }
    fn embedding(&self) -> &Tensor {
        &self.embedding
    }
    fn hidden(&self, input: &Input) -> Result<Hidden> {
        Ok(Hidden { last: input.embeddings().shallow_clone(), last_of: None, tapped: Vec::new() })
    }
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_matmul(&self.head.f_tr()?)?)
    }
}
