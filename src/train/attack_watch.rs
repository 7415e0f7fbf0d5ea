//! Tells when the training attack finds nothing any more.

use std::collections::VecDeque;

use super::{metrics::UpdateMetrics, observer::Observer};
use crate::Result;

/// Updates over which what the attack does is averaged.
const UPDATES: usize = 20;

/// Watches whether the attack still lowers its objective, and warns once when it no longer does.
///
/// A model can withstand an attack, or learn to lead so short a one astray (catastrophic overfitting, Wong et al. 2020): the
/// metrics of training look alike in both cases, and a stronger attack tells which it is. An attack that
/// returns its best iterate is never warned of: its last objective is the lowest of all, and so at most the first.
#[derive(Debug, Default)]
pub(super) struct AttackWatch {
    /// The objective at the first candidate and at the last, of each of the last updates.
    recent: VecDeque<(f64, f64)>,
    warned: bool,
}

impl Observer for AttackWatch {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        let Some(attack) = &metrics.attack else { return Ok(()) };
        let (first, last) = (attack.objective_first, attack.objective_last);
        // An attack of one step tries nothing after its first candidate.
        if self.warned || first == last {
            return Ok(());
        }
        self.recent.push_back((first, last));
        if self.recent.len() > UPDATES {
            self.recent.pop_front();
        }
        if let Some((first, last)) = self.finds_nothing() {
            self.warned = true;
            tracing::warn!(
                update = metrics.update,
                first,
                last,
                "the last candidate that the attack tries is no better than the first, mean over {UPDATES} updates: measure with \
                 an attack of many more steps whether the model withstands it or has learnt to lead it astray; if so, train with \
                 more steps"
            );
        }
        Ok(())
    }
}

impl AttackWatch {
    /// The mean objective at the first candidate and at the last, if the last is no lower.
    fn finds_nothing(&self) -> Option<(f64, f64)> {
        if self.recent.len() < UPDATES {
            return None;
        }
        let mean = |of: fn(&(f64, f64)) -> f64| self.recent.iter().map(of).sum::<f64>() / UPDATES as f64;
        let (first, last) = (mean(|one| one.0), mean(|one| one.1));
        (last >= first).then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AttackMetrics;

    /// The update at which a run of these objectives is warned of, from 1.
    fn warned(objectives: impl IntoIterator<Item = (f64, f64)>) -> Option<usize> {
        let mut watch = AttackWatch::default();
        for (update, (objective_first, objective_last)) in (1..).zip(objectives) {
            let attack = Some(AttackMetrics { objective_first, objective_last, ..Default::default() });
            watch.update(&UpdateMetrics { update, attack, ..Default::default() }).unwrap();
            if watch.warned {
                return Some(update);
            }
        }
        None
    }

    #[test]
    fn an_attack_that_finds_nothing_is_told_of_once_its_mean_says_so() {
        assert_eq!(warned([(2.0, 1.0); 50]), None);
        assert_eq!(warned([(2.0, 2.5); 19]), None, "too few to tell");
        assert_eq!(warned([(2.0, 2.5); 20]), Some(20));
        // Half of the last twenty outweigh the other half.
        assert_eq!(warned([[(2.0, 1.0); 30], [(2.0, 3.0); 30]].concat()), Some(40));
        assert_eq!(warned([(1.0, 1.0); 50]), None, "one step tries one candidate");
        assert_eq!(warned([(f64::NAN, 1.0); 50]), None);
        let mut watch = AttackWatch::default();
        (0..50).for_each(|_| watch.update(&UpdateMetrics::default()).unwrap());
        assert!(!watch.warned, "no attack");
    }
}
