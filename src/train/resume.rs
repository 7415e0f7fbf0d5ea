//! How a run is saved and goes on.

use std::{fs::File, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    checkpoint::CheckpointStore,
    identity::{Identity, difference},
    trainer::{AdversarialTrainer, Attacking},
};
use crate::{Error, Result, TrainableLm, WarmStarts, error::Context, files, read_tensors, write_tensors};

/// The checkpoints of a run.
pub(super) struct Checkpoints {
    pub(super) store: CheckpointStore,
    /// What the run is.
    pub(super) identity: Identity,
    /// The update of the newest one that this run wrote or went on from.
    pub(super) newest: Option<usize>,
    /// While the run is at work, or about to be.
    pub(super) lock: Option<File>,
}

/// The numbers of a checkpoint that are not tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrainerState {
    update: usize,
    run: Identity,
}

const STATE: &str = "trainer.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const WARM_STARTS: &str = "warm_starts.safetensors";
const ATTACK: &str = "attack.safetensors";

impl<M: TrainableLm> AdversarialTrainer<M> {
    /// Keeps other processes from the folder.
    pub(super) fn hold_folder(&mut self) -> Result<()> {
        if let Some(checkpoints) = self.checkpoints.as_mut().filter(|checkpoints| checkpoints.lock.is_none()) {
            checkpoints.lock = Some(checkpoints.store.lock()?);
        }
        Ok(())
    }

    pub(super) fn release_folder(&mut self) {
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.lock = None;
        }
    }

    /// An error if the folder holds checkpoints that this run neither wrote nor goes on from.
    pub(super) fn check_folder(&self) -> Result<()> {
        match self.latest_checkpoint()? {
            Some((update, folder)) if Some(update) != self.newest_checkpoint() => {
                let message = "a checkpoint of an earlier run: resume from it, or choose another folder";
                Err(Error::file(folder, message))
            }
            _ => Ok(()),
        }
    }

    fn newest_checkpoint(&self) -> Option<usize> {
        self.checkpoints.as_ref().and_then(|checkpoints| checkpoints.newest)
    }

    /// Writes a checkpoint, if the trainer has a folder and none of this update: weights, moments, warm starts, the attack's
    /// state, the place in the run, and what tells the run from another. No other process can use the folder from then on,
    /// until the run ends or the trainer is dropped.
    ///
    /// # Errors
    /// If a file cannot be written, another process is at work in the folder, or it holds checkpoints of an earlier run that
    /// this one did not go on from.
    pub fn save_checkpoint(&mut self) -> Result<()> {
        self.hold_folder()?;
        self.check_folder()?;
        let Some(checkpoints) = self.checkpoints.as_ref().filter(|one| one.newest != Some(self.update)) else {
            return Ok(());
        };
        let state = TrainerState { update: self.update, run: checkpoints.identity.clone() };
        checkpoints.store.save(self.update, |folder| {
            write_tensors(&folder.join(OPTIMIZER), &self.optimizer.state()?)?;
            if let Some(Attacking { attack, runner, .. }) = &self.attack {
                write_tensors(&folder.join(WARM_STARTS), &runner.warm_starts().to_tensors()?)?;
                write_tensors(&folder.join(ATTACK), &attack.state()?)?;
            }
            files::write_json(&folder.join(STATE), &state)
        })?;
        tracing::info!(update = self.update, "checkpoint written");
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.newest = Some(self.update);
        }
        Ok(())
    }

    fn latest_checkpoint(&self) -> Result<Option<(usize, PathBuf)>> {
        match &self.checkpoints {
            Some(checkpoints) => checkpoints.store.latest(),
            None => Ok(None),
        }
    }

    /// Goes back to the newest checkpoint of the trainer's folder, if there is one; gives the number of updates done. No other
    /// process can use the folder from then on, until the run ends or the trainer is dropped.
    ///
    /// # Errors
    /// If another process is at work in the folder, if the checkpoint is of another run (another original model, adapter,
    /// attack, loss, setting or row: the message says which), or a file of it is not what it should be. The weights are then
    /// as they were.
    pub fn resume(&mut self) -> Result<usize> {
        self.hold_folder()?;
        let (Some((update, folder)), Some(checkpoints)) = (self.latest_checkpoint()?, &mut self.checkpoints) else {
            return Ok(0);
        };
        let state: TrainerState = files::read_json(&folder.join(STATE))?;
        if let Some((what, was, is)) = difference(&state.run, &checkpoints.identity) {
            let message = format!(
                "a checkpoint of another run, whose {what} was {was} and not {is}; go on with that, or choose another folder"
            );
            return Err(Error::file(folder.join(STATE), message));
        }
        if state.update != update {
            let message = format!("update = {}: in this folder it must be {update}", state.update);
            return Err(Error::file(folder.join(STATE), message));
        }
        let device = self.model.device();
        let optimizer = read_tensors(&folder.join(OPTIMIZER), device)?;
        if let Some(Attacking { attack, runner, .. }) = &mut self.attack {
            let warm = WarmStarts::from_tensors(read_tensors(&folder.join(WARM_STARTS), tch::Device::Cpu)?)?;
            attack.restore(read_tensors(&folder.join(ATTACK), device)?.into_iter().collect())?;
            runner.set_warm_starts(warm);
        }
        self.optimizer.restore(optimizer).context(|| format!("resuming from {}", folder.display()))?;
        checkpoints.newest = Some(update);
        self.update = state.update;
        Ok(self.update)
    }
}
