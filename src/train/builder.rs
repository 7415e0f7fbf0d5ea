//! Putting a trainer together, and checking that its parts fit.

use std::path::PathBuf;

use tch::Kind;

use super::{
    attack_watch::AttackWatch,
    checkpoint::CheckpointStore,
    data::{Reference, TrainingData},
    identity::{self, Identity},
    optimizer::AdamW,
    resume::Checkpoints,
    settings::TrainSettings,
    trainer::{AdversarialTrainer, Attacking},
};
use crate::{
    AttackObjective, AttackSettings, ContinuationKind, EmbeddingAttack, Error, Example, Result, RobustLoss, Sampler,
    SamplerSettings, TargetCrossEntropy, TrainableLm, UtilityLoss, error::Context,
};

/// The original model's entry in a run's identity.
const MODEL: &str = "original model";

/// Collects what an [`AdversarialTrainer`] is made of.
#[must_use]
pub struct TrainerBuilder<M: TrainableLm> {
    model: M,
    attack: Option<(Box<dyn EmbeddingAttack>, AttackSettings)>,
    objective: Box<dyn AttackObjective>,
    robust: Option<Box<dyn RobustLoss>>,
    utility: Option<Box<dyn UtilityLoss>>,
    data: TrainingData,
    settings: TrainSettings,
    folder: Option<PathBuf>,
}

impl<M: TrainableLm> std::fmt::Debug for TrainerBuilder<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainerBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl<M: TrainableLm> TrainerBuilder<M> {
    pub(super) fn new(model: M) -> Self {
        Self {
            model,
            attack: None,
            objective: Box::new(TargetCrossEntropy),
            robust: None,
            utility: None,
            data: TrainingData::default(),
            settings: TrainSettings::default(),
            folder: None,
        }
    }

    /// The attack, and what the framework does around it.
    pub fn attack(mut self, attack: impl EmbeddingAttack + 'static, settings: AttackSettings) -> Self {
        self.attack = Some((Box::new(attack), settings));
        self
    }

    /// What the attack drives down; [`TargetCrossEntropy`] if not set.
    pub fn objective(mut self, objective: impl AttackObjective + 'static) -> Self {
        self.objective = Box::new(objective);
        self
    }

    /// The loss on robust rows.
    pub fn robust(mut self, loss: impl RobustLoss + 'static) -> Self {
        self.robust = Some(Box::new(loss));
        self
    }

    /// The loss on utility rows.
    pub fn utility(mut self, loss: impl UtilityLoss + 'static) -> Self {
        self.utility = Some(Box::new(loss));
        self
    }

    /// The rows.
    pub fn data(mut self, data: TrainingData) -> Self {
        self.data = data;
        self
    }

    /// The settings; [`TrainSettings::default`] if not set.
    pub fn settings(mut self, settings: TrainSettings) -> Self {
        self.settings = settings;
        self
    }

    /// The run's folder: for checkpoints and the cache of reference values. Without, nothing is kept.
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Checks that everything fits together, and computes reference values where the loss wants them.
    ///
    /// # Errors
    /// If a setting is out of range, a loss has no rows or rows no loss, a row lacks a continuation that the loss needs,
    /// two rows share an id, the attack is on rows that are never drawn or has no token to move in one, the model has
    /// nothing to train or computes in float16, or a loss compares with the original model and there is no adapter that
    /// could be switched off.
    pub fn build(self) -> Result<AdversarialTrainer<M>> {
        self.settings.validate()?;
        self.robust.as_ref().map_or(Ok(()), |loss| loss.validate())?;
        self.utility.as_ref().map_or(Ok(()), |loss| loss.validate())?;
        self.check_model()?;
        self.check_rows()?;
        let identity = self.identity()?;
        let settings = self.settings;
        let sampler = Sampler::new(SamplerSettings {
            robust_rows: self.data.robust.len(),
            utility_rows: self.data.utility.len(),
            batch_size: settings.batch_size,
            utility_share: settings.utility_share,
            seed: settings.seed,
        })?;
        let planned = settings.epochs.saturating_mul(sampler.updates_per_epoch() as usize);
        let updates_total = settings.max_updates.map_or(planned, |most| most.min(planned));
        if (0..updates_total).all(|update| settings.schedule.factor(update, updates_total) == 0.0) {
            tracing::warn!(
                updates_total,
                "the run is so short that it is over in the warm-up, at a learning rate of 0"
            );
        }
        let attack = match self.attack {
            Some((attack, around)) => Some(Attacking::new(attack, around, self.objective, &self.model)?),
            None => None,
        };
        let optimizer = AdamW::new(self.model.parameters(), settings.optimizer.clone())?;
        let reference = match &self.robust {
            Some(loss) => Reference::prepare(
                loss.as_ref(),
                &self.model,
                &identity[MODEL],
                &self.data.robust,
                settings.micro_batch_size,
                self.folder.as_deref(),
            )
            .context(|| "computing reference values")?,
            None => Reference::default(),
        };
        let checkpoints = match &self.folder {
            Some(folder) => {
                let mut identity = identity;
                identity.extend(identity::of_run(&settings, &self.data, updates_total)?);
                let store = CheckpointStore::new(folder, settings.keep_checkpoints);
                Some(Checkpoints { store, identity, newest: None, lock: None })
            }
            None => None,
        };
        Ok(AdversarialTrainer {
            checkpoints,
            updates_total,
            model: self.model,
            attack,
            robust: self.robust,
            utility: self.utility,
            data: self.data,
            settings,
            sampler,
            optimizer,
            reference,
            observers: vec![Box::new(AttackWatch::default())],
            update: 0,
        })
    }

    /// What model, attack and losses say of themselves.
    fn identity(&self) -> Result<Identity> {
        let none = || "none".to_string();
        let (attack, around) = match &self.attack {
            Some((attack, around)) => (attack.describe(), format!("{around:?}")),
            None => (none(), none()),
        };
        Ok(Identity::from([
            (MODEL.into(), format!("{} in {:?}", self.model.fingerprint()?, self.model.kind())),
            ("adapter".into(), self.model.describe()),
            ("weights to train, at the start".into(), self.model.trained_fingerprint()?),
            ("attack".into(), attack),
            ("attack settings".into(), around),
            ("attack objective".into(), self.objective.describe()),
            ("robust loss".into(), self.robust.as_ref().map_or_else(none, |loss| loss.describe())),
            ("utility loss".into(), self.utility.as_ref().map_or_else(none, |loss| loss.describe())),
        ]))
    }

    fn check_model(&self) -> Result<()> {
        if self.model.kind() == Kind::Half {
            return Err(Error::setting(
                "dtype",
                "float16",
                "bfloat16 or float32 to train: float16 would need loss scaling",
            ));
        }
        if self.model.parameters().is_empty() {
            return Err(Error::mismatch(
                "model to train",
                "one with an adapter, or with all weights in training",
                "neither",
            ));
        }
        let uses_reference = self.robust.as_ref().is_some_and(|loss| loss.uses_reference())
            || self.utility.as_ref().is_some_and(|loss| loss.uses_reference());
        if uses_reference && !self.model.has_adapter() {
            let expected = "one with an adapter, which is switched off for the reference";
            return Err(Error::mismatch("model for a loss that compares with the original", expected, "one without"));
        }
        Ok(())
    }

    fn check_rows(&self) -> Result<()> {
        self.data.check_ids()?;
        let share = self.settings.utility_share;
        for (what, loss, rows, wanted) in [
            ("robust", self.robust.is_some(), self.data.robust.len(), share < 1.0),
            ("utility", self.utility.is_some(), self.data.utility.len(), share > 0.0),
        ] {
            if wanted && !loss {
                return Err(Error::setting(
                    "train.utility_share",
                    share,
                    format!("such that no {what} row is drawn, without a {what} loss"),
                ));
            }
            if wanted && rows == 0 {
                return Err(Error::setting(
                    "train.utility_share",
                    share,
                    format!("such that no {what} row is drawn, without {what} rows"),
                ));
            }
        }
        if let Some((attack, _)) = &self.attack {
            let rows = attack.threat().rows;
            let drawn = if rows == ContinuationKind::Utility { share > 0.0 } else { share < 1.0 };
            if !drawn {
                let allowed = format!("such that {rows:?} rows, which the attack is on, are drawn");
                return Err(Error::setting("train.utility_share", share, allowed));
            }
            let utility = attack.threat().rows == ContinuationKind::Utility;
            attack.threat().check_rows(if utility { &self.data.utility } else { &self.data.robust })?;
        }
        let needs = self.robust.as_ref().map_or(&[][..], |loss| loss.needs());
        check_continuations(&self.data.robust, needs)?;
        check_continuations(&self.data.utility, &[ContinuationKind::Utility])
    }
}

fn check_continuations(rows: &[Example], needs: &[ContinuationKind]) -> Result<()> {
    for example in rows {
        if let Some(missing) = needs.iter().find(|kind| example.continuation(**kind).is_none()) {
            return Err(Error::example(example.id(), format!("has no {missing:?} continuation, which the loss needs")));
        }
    }
    Ok(())
}
