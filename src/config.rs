//! One TOML file that describes a run, and the paper's runs as presets.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    AdvIpoLoss, AdvUlLoss, Against, AttackSettings, CutOffForm, Date, Dtype, EmbeddingAttack, Error, Family, FloorForm,
    Grouping, LoraConfig, Momentum, Pgd, Radius, Reduction, Result, RobustLoss, ScheduleShape, Start, StepRule,
    StepSize, SupervisedLoss, TemplatePreset, ThreatModel, TrainSettings, Turns, UtilityLoss, files,
};

/// A whole run: every setting of how model and data are read, and of adapter, attack, losses and training.
///
/// Written back whole beside the run's results, so that this file, the model folder and the data files repeat it. Unknown
/// fields are errors.
///
/// ```
/// use advtrain::{Algorithm, ModelPreset, Preset, RunConfig};
///
/// let config = RunConfig::preset(Algorithm::AdvIpo, Preset::Corrected, ModelPreset::Gemma2b);
/// let text = config.to_toml()?;
/// assert_eq!(RunConfig::from_toml(&text, "run.toml")?, config);
/// # Ok::<(), advtrain::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The model.
    #[serde(default)]
    pub model: ModelSettings,
    /// How text becomes rows.
    #[serde(default)]
    pub data: DataSettings,
    /// The adapter.
    #[serde(default)]
    pub lora: LoraConfig,
    /// The attack; without, training sees no perturbation (the paper's control).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack: Option<Pgd>,
    /// What the framework does around the attack.
    #[serde(default)]
    pub attack_settings: AttackSettings,
    /// The robust loss.
    pub loss: LossConfig,
    /// The loss on utility rows, used where `train.utility_share` is above 0.
    #[serde(default)]
    pub utility: SupervisedLoss,
    /// Training.
    #[serde(default)]
    pub train: TrainSettings,
}

/// How a model is loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// The compute dtype, not float16; `auto` is decided by the device and written back as what it became.
    pub dtype: Dtype,
    /// A template of the paper in place of the folder's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplatePreset>,
}

/// How text becomes rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSettings {
    /// The most tokens of a prompt with one continuation; at least 2. Default 128.
    pub max_tokens: usize,
    /// Which turns of a chat are learnt. Default all.
    pub turns: Turns,
    /// Of each utility row so many tokens of answers are learnt, the first ones, and the rest is not read; at least 1. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utility_tokens: Option<usize>,
    /// Whether a behaviour's targets, which are how an answer begins, are taken for whole answers that end
    /// ([`crate::AnswerPair::harmful_ends`], which is to be set in each pair), as in the authors' implementation. Default false.
    pub ended_targets: bool,
    /// What a template prints that asks for today's date, so that the run's rows stay the same. Default today's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<Date>,
    /// Random strings behind what users say in rows to train on ([`crate::RandomStrings`], drawn with the run's seed). Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strings: Option<StringShares>,
}

/// How many rows have a random string behind what the user says: of harmful rows behind the last message, of chats behind the
/// first. `max_tokens` must leave room for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StringShares {
    /// The share of harmful rows, from 0 to 1.
    pub harmful: f64,
    /// The share of utility rows, from 0 to 1: without any, a string alone is a reason to refuse.
    pub utility: f64,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            turns: Turns::All,
            utility_tokens: None,
            ended_targets: false,
            date: None,
            strings: None,
        }
    }
}

/// A robust loss and its settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossConfig {
    /// C-AdvUL.
    AdvUl(AdvUlLoss),
    /// C-AdvIPO.
    AdvIpo(AdvIpoLoss),
}

impl LossConfig {
    /// The loss itself.
    pub fn build(&self) -> Box<dyn RobustLoss> {
        match self {
            Self::AdvUl(loss) => Box::new(loss.clone()),
            Self::AdvIpo(loss) => Box::new(loss.clone()),
        }
    }

    fn validate(&self) -> Result<()> {
        match self {
            Self::AdvUl(loss) => loss.validate(),
            Self::AdvIpo(loss) => loss.validate(),
        }
    }
}

/// The paper's two algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// C-AdvUL.
    AdvUl,
    /// C-AdvIPO.
    AdvIpo,
}

/// Whose choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// The authors' implementation: absolute steps of 1e-4, dropout in the attack, reduction within micro-batches, a
    /// cut-off that jumps, a floor that zeroes, the last turn of a chat alone, no warm-up. Its plain faults (references of
    /// another example, stray gradients, masks by the sign of an id) are not reproduced, and weights are not quantised.
    Published,
    /// The same losses and schedule with what this crate holds to be right: steps that reach the ball, no dropout in the
    /// attack, reduction per row, a continuous cut-off, a clamped floor, every turn, warm-up.
    Corrected,
    /// `Corrected` with an attack of three passes in place of ten: steps along the root of the gradient with a momentum, from where
    /// the last attack on the same prompt ended. For short runs: from zero it is weaker than `Corrected`'s, and in long runs the
    /// model learns to lead it astray; docs/performance.md and docs/earlier.md have what is measured.
    Fast,
    /// For a model of some hundred million parameters on a CPU, with utility rows that it writes itself: `Corrected` with the ten
    /// steps of its attack along a momentum of the normalised gradient, from a random start; 300 updates at a higher learning rate,
    /// the first 32 tokens of each utility answer held against the original model's predictions and the very first once more, a
    /// quarter of the rows behind random strings, C-AdvUL's terms cut off earlier (away) and later (toward), C-AdvIPO's margin
    /// wider, its weight less than a tenth and utility rows beside it, no dropout, epsilon 0.1 whatever the model. docs/small.md
    /// says why, and what failed.
    Small,
}

/// Models of the paper, which differ in epsilon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelPreset {
    /// Gemma-2B-it: 0.1.
    Gemma2b,
    /// Phi-3-mini-4k-instruct: 0.1.
    Phi3Mini,
    /// Mistral-7B-Instruct: 0.05.
    Mistral7b,
    /// Zephyr-7B-beta: 0.075.
    Zephyr7b,
    /// Llama-2-7B-chat: 0.05.
    Llama2_7b,
}

impl ModelPreset {
    /// The paper's model of a family. Mistral's stands for Zephyr too, which has the same `model_type`, and Llama's for
    /// families that the paper lacks.
    pub fn of_family(family: Family) -> Self {
        match family {
            Family::Gemma => Self::Gemma2b,
            Family::Phi3 => Self::Phi3Mini,
            Family::Mistral => Self::Mistral7b,
            Family::Llama | Family::Qwen2 => Self::Llama2_7b,
        }
    }

    /// Epsilon as a share of the mean norm of the embedding table's rows.
    pub fn relative_radius(self) -> f64 {
        match self {
            Self::Gemma2b | Self::Phi3Mini => 0.1,
            Self::Zephyr7b => 0.075,
            Self::Mistral7b | Self::Llama2_7b => 0.05,
        }
    }
}

impl RunConfig {
    /// A run of the paper.
    pub fn preset(algorithm: Algorithm, preset: Preset, model: ModelPreset) -> Self {
        let threat = ThreatModel { radius: Radius::Relative(model.relative_radius()), ..ThreatModel::default() };
        let (loss, train, max_tokens) = match algorithm {
            Algorithm::AdvUl => {
                let train = TrainSettings { epochs: 5, utility_share: 0.875, ..TrainSettings::default() };
                (LossConfig::AdvUl(AdvUlLoss::default()), train, 256)
            }
            Algorithm::AdvIpo => (LossConfig::AdvIpo(AdvIpoLoss::default()), TrainSettings::default(), 128),
        };
        let corrected = Self {
            model: ModelSettings::default(),
            data: DataSettings { max_tokens, ..DataSettings::default() },
            lora: LoraConfig::default(),
            attack: Some(Pgd { threat, ..Pgd::default() }),
            attack_settings: AttackSettings::default(),
            loss,
            utility: SupervisedLoss::default(),
            train,
        };
        match preset {
            Preset::Corrected => corrected,
            Preset::Published => corrected.into_published(),
            Preset::Fast => corrected.into_fast(),
            Preset::Small => corrected.into_small(),
        }
    }

    fn into_fast(mut self) -> Self {
        if let Some(attack) = &mut self.attack {
            attack.steps = 3;
            attack.rule = StepRule::Root;
            attack.momentum = Some(Momentum { decay: 0.5 });
        }
        self.attack_settings.warm_start = true;
        self
    }

    fn into_small(mut self) -> Self {
        (self.data.max_tokens, self.data.utility_tokens) = (256, Some(32));
        self.data.strings = Some(StringShares { harmful: 0.25, utility: 0.25 });
        self.lora.dropout = 0.0;
        if let Some(attack) = &mut self.attack {
            let threat = ThreatModel { radius: Radius::Relative(0.1), ..attack.threat.clone() };
            *attack = Pgd { steps: attack.steps, ..Pgd::measuring(threat) };
        }
        self.attack_settings.start = Start::Uniform;
        match &mut self.loss {
            LossConfig::AdvUl(loss) => (loss.away_cut_off.threshold, loss.toward_cut_off.threshold) = (-4.0, 0.05),
            LossConfig::AdvIpo(loss) => (loss.beta, loss.weight) = (0.085, 0.085),
        }
        self.utility = SupervisedLoss { weight: 3.0, first_weight: 1.0, against: Against::Reference };
        // The length is that of `max_updates`; of a set of few rows that is several epochs.
        (self.train.epochs, self.train.max_updates) = (100, Some(300));
        // In the paper C-AdvIPO has no utility rows.
        (self.train.micro_batch_size, self.train.utility_share) = (16, 0.875);
        self.train.optimizer.learning_rate = 5e-4;
        self
    }

    fn into_published(mut self) -> Self {
        self.data.turns = Turns::Last;
        self.data.ended_targets = true;
        if let Some(attack) = &mut self.attack {
            attack.size = StepSize::Absolute(1e-4);
        }
        self.attack_settings.dropout = true;
        match &mut self.loss {
            LossConfig::AdvUl(loss) => {
                loss.away_cut_off.form = CutOffForm::Jumping;
                loss.toward_cut_off.form = CutOffForm::Jumping;
            }
            LossConfig::AdvIpo(loss) => loss.harmful_floor.form = FloorForm::Zero,
        }
        self.train.reduction = Reduction::MicroBatch;
        self.train.grouping = Grouping::AsDrawn;
        self.train.schedule.warm_up = 0.0;
        self.train.schedule.shape = ScheduleShape::Cosine;
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.model.dtype == Dtype::Float16 {
            // The trainer refuses it too, but when the weights have been loaded.
            return Err(Error::setting("model.dtype", "float16", "auto, bfloat16 or float32 to train"));
        }
        if self.data.max_tokens < 2 {
            return Err(Error::setting("data.max_tokens", self.data.max_tokens, "at least 2"));
        }
        Error::check_count("data.utility_tokens", self.data.utility_tokens.unwrap_or(1))?;
        if let Some(shares) = self.data.strings {
            Error::check_share("data.strings.harmful", shares.harmful)?;
            Error::check_share("data.strings.utility", shares.utility)?;
        }
        self.lora.validate()?;
        self.attack_settings.validate()?;
        match &self.attack {
            Some(attack) => {
                attack.validate()?;
                self.attack_settings.check_restarts(attack)?;
            }
            None if self.attack_settings != AttackSettings::default() => {
                let found = "not its default, without [attack]";
                return Err(Error::setting(
                    "attack_settings",
                    found,
                    "left out in a run without attack; with one, write [attack]",
                ));
            }
            None => {}
        }
        self.loss.validate()?;
        self.utility.validate()?;
        self.train.validate()
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// If the file cannot be read, a field is unknown, missing or of the wrong type, or out of range.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_toml(&files::read_text(path.as_ref())?, path)
    }

    /// Reads TOML text; `path` is for messages.
    ///
    /// # Errors
    /// As [`RunConfig::read`].
    pub fn from_toml(text: &str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let config: Self = files::parse_toml(text, path)?;
        config.validate().map_err(|error| error.while_doing(format!("reading {}", path.display())))?;
        Ok(config)
    }

    /// The whole configuration as TOML.
    ///
    /// # Errors
    /// If a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::mismatch("configuration as TOML", "values that TOML has", error))
    }

    /// Writes the whole configuration.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        files::write(path.as_ref(), self.to_toml()?.as_bytes())
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
