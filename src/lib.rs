//! Adversarial training of language models in embedding space, on libtorch through [`tch`].
//!
//! The method is continuous adversarial training (Xhonneux et al., ["Efficient Adversarial Training in LLMs with Continuous
//! Attacks"](https://arxiv.org/abs/2405.15589), NeurIPS 2024): an attack perturbs the embeddings of a harmful prompt so that
//! the harmful answer becomes likelier, and the model is trained, on the perturbed prompt, away from it and toward a refusal.
//!
//! Five traits and a trainer are the whole of the training; [`PromptAttack`], [`Judge`], [`UtilityTask`] and [`ChatModel`] are
//! those of the evaluation:
//!
//! | seam | what it stands for | shipped |
//! |---|---|---|
//! | [`CausalLm`] | what attacks and losses need of a model | [`Decoder`] |
//! | [`EmbeddingAttack`] | how to search for a perturbation | [`Pgd`] |
//! | [`AttackObjective`] | what to search for | [`TargetCrossEntropy`] |
//! | [`RobustLoss`] | what to learn on attacked rows | [`AdvUlLoss`], [`AdvIpoLoss`] |
//! | [`UtilityLoss`] | what to keep on harmless rows | [`SupervisedLoss`] |
//! | [`AdversarialTrainer`] | the loop around them | |
//!
//! # Example
//!
//! A random model of a few thousand weights learns to prefer one answer to another under attack:
//!
//! ```
//! use advtrain::{
//!     AdvIpoLoss, AdversarialTrainer, AttackSettings, Continuation, ContinuationKind, Decoder, Example, LoraConfig, Pgd,
//!     TokenKind, Tokens, TrainSettings, TrainingData,
//!     tch::{Device, Kind},
//! };
//!
//! let config = serde_json::json!({
//!     "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
//!     "num_attention_heads": 2, "tie_word_embeddings": true
//! });
//! let mut model = Decoder::random(config, 0.3, 0, Kind::Float, Device::Cpu)?;
//! model.add_lora(&LoraConfig { rank: 4, ..LoraConfig::default() }, 0)?;
//!
//! let answer = |kind, ids: &[i64]| Continuation { kind, tokens: Tokens::of_kind(ids.to_vec(), TokenKind::Target) };
//! let row = Example::new(
//!     "example/0",
//!     Tokens::of_kind(vec![1, 20, 21, 22], TokenKind::User),
//!     vec![answer(ContinuationKind::Harmful, &[30, 31, 2]), answer(ContinuationKind::Safe, &[40, 2])],
//! )?;
//! let mut trainer = AdversarialTrainer::builder(model)
//!     .attack(Pgd::default(), AttackSettings::default())
//!     .robust(AdvIpoLoss::default())
//!     .data(TrainingData { robust: vec![row], utility: Vec::new() })
//!     .settings(TrainSettings { epochs: 20, batch_size: 1, ..TrainSettings::default() })
//!     .build()?;
//! let losses = (0..20).map(|_| Ok(trainer.step()?.loss)).collect::<advtrain::Result<Vec<f64>>>()?;
//! assert!(losses[19] < losses[0]);
//! # Ok::<(), advtrain::Error>(())
//! ```
//!
//! # Should I use this crate?
//!
//! Yes, to harden a chat model of a supported family with the paper's algorithms, or to try attacks and losses of your own in
//! the same loop. Not yet for 4-bit weights, several GPUs, or families with experts or other attention.
//!
//! # Shapes
//!
//! Batches are packed: every per-token tensor is `[tokens, …]` without padding, and a [`Layout`] says where each token
//! stands. Perturbations, losses, adapters and the optimiser's state are float32, or float64 where the model computes in that.
//!
//! # Errors and panics
//!
//! Every fallible call returns [`Result`]. The crate does not panic on input, does not print (a progress bar aside), and logs
//! through [`tracing`](https://docs.rs/tracing).
//!
//! # Crate features
//!
//! - `download-libtorch`: torch-sys downloads a CPU build of libtorch where none is found.
//! - `doc-only`: type-checks and documents without libtorch; nothing links.

mod attack;
mod config;
#[cfg(libtorch_cuda)]
mod cuda_link;
mod data;
mod digest;
mod error;
mod eval;
mod files;
mod loss;
mod model;
mod tensor;
mod train;
mod version;

pub use attack::*;
pub use config::{Algorithm, DataSettings, LossConfig, ModelPreset, ModelSettings, Preset, RunConfig, StringShares};
pub use data::*;
pub use error::{Error, ErrorKind, Result};
pub use eval::*;
pub use loss::*;
pub use model::*;
pub use ndarray;
pub use tch;
pub use train::*;

/// Keeps the README's program compiling.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
