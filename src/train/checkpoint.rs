//! A run's checkpoints: folders that are either whole or not there.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// The folder `<run>/checkpoints`, with a folder per checkpoint.
#[derive(Debug)]
pub(super) struct CheckpointStore {
    folder: PathBuf,
    keep: usize,
}

const PREFIX: &str = "update-";

impl CheckpointStore {
    /// `keep`: how many of the newest checkpoints stay; at least one does.
    pub(super) fn new(run: &Path, keep: usize) -> Self {
        Self { folder: run.join("checkpoints"), keep: keep.max(1) }
    }

    /// Writes a checkpoint beside its place, by `write`, and renames it into place; then removes the oldest.
    pub(super) fn save(&self, update: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let name = format!("{PREFIX}{update:06}");
        let beside = self.folder.join(format!(".{name}.partial"));
        let place = self.folder.join(name);
        remove(&beside)?;
        fs::create_dir_all(&beside).map_err(|error| Error::io(&beside, error))?;
        write(&beside)?;
        remove(&place)?;
        fs::rename(&beside, &place).map_err(|error| Error::io(&place, error))?;
        // Without this the rename may not survive a power cut.
        if let Ok(folder) = fs::File::open(&self.folder) {
            folder.sync_all().map_err(|error| Error::io(&self.folder, error))?;
        }
        let all = self.all()?;
        for (_, old) in &all[..all.len().saturating_sub(self.keep)] {
            remove(old)?;
        }
        Ok(place)
    }

    /// The newest checkpoint: after how many updates, and its folder.
    pub(super) fn latest(&self) -> Result<Option<(usize, PathBuf)>> {
        Ok(self.all()?.pop())
    }

    /// All whole checkpoints, oldest first.
    fn all(&self) -> Result<Vec<(usize, PathBuf)>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.folder).map_err(|error| Error::io(&self.folder, error))?;
        let mut all: Vec<(usize, PathBuf)> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let update = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
                Some((update, path))
            })
            .collect();
        all.sort();
        Ok(all)
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, CheckpointStore) {
        let run = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(run.path(), 2);
        (run, store)
    }

    #[test]
    fn the_newest_are_kept() {
        let (_run, store) = store();
        for update in [5, 10, 15] {
            store.save(update, |folder| crate::files::write(&folder.join("a"), b"x")).unwrap();
        }
        let kept: Vec<usize> = store.all().unwrap().into_iter().map(|(update, _)| update).collect();
        assert_eq!(kept, [10, 15]);
    }

    #[test]
    fn one_that_was_not_finished_is_not_seen() {
        let (_run, store) = store();
        store.save(5, |_| Ok(())).unwrap();
        let failed = store.save(10, |folder| {
            crate::files::write(&folder.join("a"), b"x")?;
            Err(Error::file(folder, "the disk is full"))
        });
        assert!(failed.is_err());
        assert_eq!(store.latest().unwrap().unwrap().0, 5);
        store.save(10, |folder| Ok(assert!(!folder.join("a").exists()))).unwrap();
        assert_eq!(store.latest().unwrap().unwrap().0, 10);
    }
}
