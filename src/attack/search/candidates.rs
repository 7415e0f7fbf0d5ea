//! Strings that differ from one in few tokens.

use rand::{Rng, RngExt, seq::index::sample};

use super::settings::{Positions, TokenSearchSettings};

/// Draws candidates next to `ids`. `promising` are, for each position, the tokens to try there, at least one.
pub(super) fn draw(
    ids: &[i64],
    promising: &[Vec<i64>],
    settings: &TokenSearchSettings,
    random: &mut impl Rng,
) -> Vec<Vec<i64>> {
    let replaced = settings.replaced.min(ids.len());
    let candidate = |index: usize| {
        let mut positions = sample(random, ids.len(), replaced).into_vec();
        if settings.positions == Positions::Spread {
            let first = index * ids.len() / settings.width;
            match positions.iter().position(|position| *position == first) {
                Some(at) => positions.swap(0, at),
                None => positions[0] = first,
            }
        }
        let mut candidate = ids.to_vec();
        for position in positions {
            let tokens = &promising[position];
            candidate[position] = tokens[random.random_range(0..tokens.len())];
        }
        candidate
    };
    (0..settings.width).map(candidate).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn drawn(settings: &TokenSearchSettings) -> Vec<Vec<i64>> {
        let promising: Vec<Vec<i64>> =
            (0..4).map(|position| (0..3).map(|k| 10 * (position + 1) + k).collect()).collect();
        draw(&[1, 2, 3, 4], &promising, settings, &mut ChaCha8Rng::seed_from_u64(0))
    }

    fn changed(candidate: &[i64]) -> Vec<usize> {
        (0..4).filter(|at| candidate[*at] != *at as i64 + 1).collect()
    }

    #[test]
    fn each_candidate_changes_so_many_positions_to_their_own_tokens() {
        let settings = TokenSearchSettings { width: 400, replaced: 2, ..TokenSearchSettings::default() };
        let mut seen = [0; 4];
        for candidate in drawn(&settings) {
            let changed = changed(&candidate);
            assert_eq!(changed.len(), 2);
            for at in changed {
                assert_eq!(candidate[at] / 10, at as i64 + 1);
                seen[at] += 1;
            }
        }
        // 200 each expected, with a deviation of 10.
        assert!(seen.iter().all(|count| (150..250).contains(count)), "{seen:?}");
    }

    #[test]
    fn positions_are_spread_evenly() {
        let settings = TokenSearchSettings { width: 8, positions: Positions::Spread, ..TokenSearchSettings::default() };
        let first: Vec<usize> = drawn(&settings).iter().flat_map(|candidate| changed(candidate)).collect();
        assert_eq!(first, [0, 0, 1, 1, 2, 2, 3, 3]);
    }
}
