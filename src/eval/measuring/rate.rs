//! Rates with their counts and intervals.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many of how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// How many.
    pub count: usize,
    /// Of how many.
    pub total: usize,
}

impl Rate {
    /// How many of these are true.
    pub fn of(flags: impl IntoIterator<Item = bool>) -> Self {
        flags
            .into_iter()
            .fold(Self::default(), |rate, flag| Self { count: rate.count + usize::from(flag), total: rate.total + 1 })
    }

    /// The share, from 0 to 1; not a number where there is nothing to share.
    pub fn share(self) -> f64 {
        self.count as f64 / self.total as f64
    }

    /// The 95 % interval of Wilson (1927).
    pub fn interval(self) -> (f64, f64) {
        const Z: f64 = 1.959_963_984_540_054;
        let n = self.total as f64;
        let p = self.share();
        let centre = p + Z * Z / (2.0 * n);
        let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        let scale = 1.0 + Z * Z / n;
        (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.total == 0 {
            return f.write_str("0/0");
        }
        let (low, high) = self.interval();
        let percent = 100.0 * self.share();
        write!(f, "{percent:.1} % ({}/{}, {:.1} to {:.1})", self.count, self.total, 100.0 * low, 100.0 * high)
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    /// Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    #[test]
    fn intervals_equal_published_ones() {
        for (count, total, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let interval = Rate { count, total }.interval();
            assert_relative_eq!(interval.0, low, epsilon = 5e-5);
            assert_relative_eq!(interval.1, high, epsilon = 5e-5);
        }
    }
}
