//! Scalars as TensorBoard event files: TFRecord frames around `tensorflow.Event` messages.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{metrics::UpdateMetrics, observer::Observer};
use crate::{Error, Result};

/// Writes the scalars of every update for TensorBoard.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// Starts an event file of its own in a folder. `done` is the number of updates already made: TensorBoard then drops
    /// what an earlier file of the same run holds beyond it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(folder: impl AsRef<Path>, done: usize) -> Result<Self> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files of a folder in the order of their names: a later file must come later in it.
        let (seconds, nanoseconds) = (since.as_secs(), since.subsec_nanos());
        let name = format!("events.out.tfevents.{seconds:010}.advtrain.{nanoseconds:09}.{}", std::process::id());
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(|error| Error::io(&path, error))?;
        let mut board = Self { path, file };
        let mut version = event(0);
        string_field(&mut version, 3, b"brain.Event:2");
        board.write(&version)?;
        // SessionLog { status: START } at the next step: what an earlier file holds from there on was never kept.
        let mut restart = event(done as u64 + 1);
        string_field(&mut restart, 7, &[0x08, 0x01]);
        board.write(&restart)?;
        Ok(board)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked_crc(&length).to_le_bytes());
        frame.extend(event);
        frame.extend(masked_crc(event).to_le_bytes());
        self.file.write_all(&frame).map_err(|error| Error::io(&self.path, error))
    }
}

impl Observer for TensorBoard {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in metrics.scalars() {
            let mut scalar = Vec::new();
            string_field(&mut scalar, 1, tag.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((value as f32).to_le_bytes());
            string_field(&mut summary, 1, &scalar);
        }
        let mut event = event(metrics.update as u64);
        string_field(&mut event, 5, &summary);
        self.write(&event)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The beginning of an Event: wall_time, a double in field 1, and step, an integer in field 2.
fn event(step: u64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(now().to_le_bytes());
    event.push(2 << 3);
    varint(&mut event, step);
    event
}

/// A field of a string, bytes or message.
fn string_field(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// CRC-32C, masked as TFRecord wants it.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// What TensorBoard's own reader checks of a frame, and the fields by their tags.
    #[test]
    fn frames_and_fields_are_where_tensorboard_looks() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 299).unwrap();
        board.update(&UpdateMetrics { update: 300, loss: 0.5, ..Default::default() }).unwrap();
        let bytes = fs::read(&board.path).unwrap();
        let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            let (event, after) = rest[12..].split_at(length);
            assert_eq!(after[..4], masked_crc(event).to_le_bytes());
            events.push(event);
            rest = &after[4..];
        }
        let [version, restart, update] = events[..] else { panic!("{} events", events.len()) };
        assert_eq!(version[9..], *b"\x10\0\x1a\x0dbrain.Event:2");
        // Step 300 as a varint, then SessionLog { status: START }.
        assert_eq!(restart[9..], [0x10, 0xac, 0x02, 0x3a, 2, 8, 1]);
        assert_eq!(update[9..13], [0x10, 0xac, 0x02, 0x2a]);
        let loss = [b"\x0a\x0atrain/loss\x15".as_slice(), &0.5f32.to_le_bytes()].concat();
        assert!(update.windows(loss.len()).any(|window| window == loss));
    }

    #[test]
    fn two_files_of_one_process_are_two() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = [0, 0].map(|done| TensorBoard::create(folder.path(), done).unwrap().path);
        assert!(first < second);
    }
}
