//! The best strings so far.

use super::FoundString;

/// Up to so many strings, the best first. Without room it holds the newest alone.
pub(super) struct Buffer {
    strings: Vec<FoundString>,
    size: usize,
}

impl Buffer {
    /// `strings` holds at least one.
    pub(super) fn new(strings: Vec<FoundString>, size: usize) -> Self {
        let mut buffer = Self { strings, size };
        buffer.sort();
        buffer
    }

    pub(super) fn best(&self) -> &FoundString {
        &self.strings[0]
    }

    /// Takes a string in, in place of the worst where the buffer is full, if it is better than that.
    pub(super) fn add(&mut self, string: FoundString) {
        if self.size == 0 {
            self.strings = vec![string];
            return;
        }
        let known = self.strings.iter().any(|held| held.ids == string.ids);
        if !known {
            self.strings.push(string);
            self.sort();
        }
    }

    fn sort(&mut self) {
        self.strings.sort_by(|a, b| a.loss.total_cmp(&b.loss));
        self.strings.truncate(self.size.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(id: i64, loss: f64) -> FoundString {
        FoundString { ids: vec![id], loss }
    }

    fn losses(buffer: &Buffer) -> Vec<f64> {
        buffer.strings.iter().map(|one| one.loss).collect()
    }

    #[test]
    fn without_room_the_newest_is_gone_on_from() {
        let mut buffer = Buffer::new(vec![string(1, 1.0)], 0);
        buffer.add(string(2, 5.0));
        assert_eq!(buffer.best(), &string(2, 5.0));
    }

    #[test]
    fn the_best_are_kept() {
        let mut buffer = Buffer::new(vec![string(1, 2.0), string(2, 1.0)], 2);
        buffer.add(string(3, 3.0));
        assert_eq!(losses(&buffer), [1.0, 2.0]);
        buffer.add(string(4, 0.5));
        buffer.add(string(4, 0.5));
        assert_eq!(losses(&buffer), [0.5, 1.0]);
        assert_eq!(buffer.best().ids, [4]);
    }
}
