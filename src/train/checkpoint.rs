//! A run's checkpoints: folders that are either whole or not there.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result, files};

/// The folder `<run>/checkpoints`, with a folder per checkpoint.
#[derive(Debug)]
pub(super) struct CheckpointStore {
    folder: PathBuf,
    keep: usize,
}

const PREFIX: &str = "update-";
const UNFINISHED: &str = ".partial";

impl CheckpointStore {
    /// `keep`: how many of the newest checkpoints stay; at least one does.
    pub(super) fn new(run: &Path, keep: usize) -> Self {
        Self { folder: run.join("checkpoints"), keep: keep.max(1) }
    }

    /// Keeps other processes from the folder, until the file is closed.
    pub(super) fn lock(&self) -> Result<fs::File> {
        files::lock(&self.folder)
    }

    /// Writes a checkpoint beside its place, by `write`, and renames it into place; then removes the oldest. The place must
    /// be free.
    pub(super) fn save(&self, update: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let name = format!("{PREFIX}{update:06}");
        let beside = self.folder.join(format!(".{name}{UNFINISHED}"));
        let place = self.folder.join(&name);
        self.remove_unfinished()?;
        fs::create_dir_all(&beside).map_err(|error| Error::io(&beside, error))?;
        write(&beside)?;
        sync(&beside)?;
        fs::rename(&beside, &place).map_err(|error| Error::io(&place, error))?;
        sync(&self.folder)?;
        self.remove_unfinished()?;
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

    /// All whole checkpoints, oldest first. Names that [`CheckpointStore::save`] does not give are the user's.
    fn all(&self) -> Result<Vec<(usize, PathBuf)>> {
        let whole = self.folders()?.into_iter().filter_map(|(name, path)| {
            let update = name.strip_prefix(PREFIX)?.parse().ok()?;
            (name == format!("{PREFIX}{update:06}")).then_some((update, path))
        });
        let mut all: Vec<_> = whole.collect();
        all.sort();
        Ok(all)
    }

    /// Removes what a crash left half-done, of any update.
    fn remove_unfinished(&self) -> Result<()> {
        let own = |name: &str| name.starts_with(&format!(".{PREFIX}")) && name.ends_with(UNFINISHED);
        let mut folders = self.folders()?.into_iter();
        folders.try_for_each(|(name, path)| if own(&name) { remove(&path) } else { Ok(()) })
    }

    fn folders(&self) -> Result<Vec<(String, PathBuf)>> {
        let at = |error| Error::io(&self.folder, error);
        let mut folders = Vec::new();
        if !self.folder.exists() {
            return Ok(folders);
        }
        for entry in fs::read_dir(&self.folder).map_err(at)? {
            let path = entry.map_err(at)?.path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some(name) if path.is_dir() => folders.push((name.to_string(), path)),
                _ => {}
            }
        }
        Ok(folders)
    }
}

/// Flushes a folder and the files right in it: without this a rename may survive a power cut and what it names not.
fn sync(folder: &Path) -> Result<()> {
    // Only Unix opens folders as files.
    if cfg!(not(unix)) {
        return Ok(());
    }
    let flush =
        |path: &Path| fs::File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::io(path, error));
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        if path.is_file() {
            flush(&path)?;
        }
    }
    flush(folder)
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
        let again = store.save(10, |_| Ok(())).unwrap();
        assert!(!again.join("a").exists());
        assert_eq!(store.latest().unwrap().unwrap().0, 10);
    }

    #[test]
    fn what_a_crash_left_goes_and_what_the_user_left_stays() {
        let (_run, store) = store();
        assert!(store.latest().unwrap().is_none());
        for folder in [".update-000007.partial", "update-best", "update-12", "update-000009.copy"] {
            fs::create_dir_all(store.folder.join(folder)).unwrap();
        }
        fs::write(store.folder.join("update-000099"), b"a file").unwrap();
        assert!(store.latest().unwrap().is_none());
        for update in [5, 6, 8] {
            store.save(update, |_| Ok(())).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(&store.folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected =
            ["update-000006", "update-000008", "update-000009.copy", "update-000099", "update-12", "update-best"];
        assert_eq!(names, expected);
    }
}
