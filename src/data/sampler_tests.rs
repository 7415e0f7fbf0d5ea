use std::collections::{HashMap, HashSet};

use super::*;

fn sampler(robust_rows: usize, utility_rows: usize, batch_size: usize, utility_share: f64) -> Sampler {
    Sampler::new(SamplerSettings { robust_rows, utility_rows, batch_size, utility_share, seed: 3 }).unwrap()
}

fn of(source: Source, batch: &[(Source, usize)]) -> Vec<usize> {
    batch.iter().filter(|(found, _)| *found == source).map(|(_, index)| *index).collect()
}

/// The paper's runs: 1189 rows, 8 or 64 of them per update. method.md counts about 780 updates in 5 epochs.
#[test]
fn the_papers_epochs() {
    assert_eq!(sampler(1189, 1000, 64, 0.875).updates_per_epoch(), 148);
    assert_eq!(sampler(1189, 0, 64, 0.0).updates_per_epoch(), 18);
    assert_eq!(sampler(1189, 0, 64, 0.0).epoch_of(18), 1);
}

#[test]
fn every_row_comes_at_most_once_per_epoch() {
    for (rows, utility, batch, share) in
        [(48, 30, 8, 0.5), (50, 30, 8, 0.5), (47, 30, 7, 0.37), (100, 9, 10, 0.33), (5, 5, 3, 0.9)]
    {
        let sampler = sampler(rows, utility, batch, share);
        let updates = sampler.updates_per_epoch();
        for epoch in 0..4 {
            let taken: Vec<usize> = (epoch * updates..(epoch + 1) * updates)
                .flat_map(|update| of(Source::Robust, &sampler.batch(update)))
                .collect();
            let distinct: HashSet<_> = taken.iter().collect();
            assert_eq!(distinct.len(), taken.len(), "{rows} rows, share {share}, epoch {epoch}");
            let mean = batch as f64 * (1.0 - share);
            assert!(taken.len() <= rows && taken.len() as f64 > rows as f64 - mean - 1.0, "{} of {rows}", taken.len());
        }
    }
}

#[test]
fn a_share_that_divides_takes_every_row() {
    let sampler = sampler(48, 30, 8, 0.5);
    let taken: HashSet<usize> = (12..24).flat_map(|update| of(Source::Robust, &sampler.batch(update))).collect();
    assert_eq!(taken.len(), 48);
}

#[test]
fn shares_are_met_in_the_long_run() {
    for share in [0.3, 0.29, 1.0 / 3.0, 0.875, 0.0, 1.0] {
        let sampler = sampler(1000, 700, 10, share);
        let mut utility = 0;
        for update in 0..300 {
            let batch = sampler.batch(update);
            assert_eq!(batch.len(), 10);
            utility += of(Source::Utility, &batch).len();
            let expected = (update + 1) as f64 * 10.0 * share;
            assert!((utility as f64 - expected).abs() < 1.0 + 1e-6, "share {share}: {utility} of {expected}");
        }
    }
    // 0.29 * 100 is 28.999999999999996 in floating point.
    assert_eq!(of(Source::Utility, &sampler(1000, 700, 100, 0.29).batch(0)).len(), 29);
}

#[test]
fn utility_rows_run_through_all_before_one_repeats() {
    let sampler = sampler(40, 30, 8, 0.5);
    let taken: Vec<usize> = (0..15).flat_map(|update| of(Source::Utility, &sampler.batch(update))).collect();
    let mut counts = HashMap::new();
    taken.iter().for_each(|row| *counts.entry(row).or_insert(0) += 1);
    assert_eq!((taken.len(), counts.len()), (60, 30));
    assert!(counts.values().all(|count| *count == 2));
}

#[test]
fn a_batch_depends_on_its_number_and_seed_alone() {
    let sampler = sampler(40, 30, 8, 0.5);
    let again = Sampler::new(*sampler.settings()).unwrap();
    let forwards: Vec<_> = (0..20).map(|update| sampler.batch(update)).collect();
    let backwards: Vec<_> = (0..20).rev().map(|update| again.batch(update)).collect();
    assert!(forwards.iter().eq(backwards.iter().rev()));
    let other = Sampler::new(SamplerSettings { seed: 4, ..*sampler.settings() }).unwrap();
    assert_ne!(forwards[0], other.batch(0));
    assert_ne!(of(Source::Robust, &forwards[0]), of(Source::Robust, &forwards[10]), "epochs differ");
}

#[test]
fn kinds_are_mixed_in_a_batch() {
    let sampler = sampler(400, 400, 8, 0.5);
    let firsts = (0..50).filter(|update| sampler.batch(*update)[0].0 == Source::Robust).count();
    assert!((10..40).contains(&firsts), "{firsts} of 50");
}

#[test]
fn one_set_alone_defines_the_epochs() {
    let tuning = sampler(0, 10, 4, 1.0);
    assert_eq!(tuning.updates_per_epoch(), 2);
    for epoch in 0..3 {
        let rows: HashSet<_> = (0..2).flat_map(|update| tuning.batch(epoch * 2 + update)).collect();
        assert_eq!(rows.len(), 8);
    }
}

#[test]
fn a_set_smaller_than_an_update_repeats() {
    let sampler = sampler(3, 10, 8, 0.0);
    assert_eq!(sampler.updates_per_epoch(), 1);
    let mut counts = [0; 3];
    (0..3).for_each(|update| sampler.batch(update).iter().for_each(|(_, row)| counts[*row] += 1));
    assert_eq!(counts, [8; 3]);
}

#[test]
fn settings_that_cannot_work_are_named() {
    let new = |robust_rows, utility_rows, batch_size, utility_share| {
        Sampler::new(SamplerSettings { robust_rows, utility_rows, batch_size, utility_share, seed: 0 })
            .unwrap_err()
            .to_string()
    };
    assert_eq!(new(1, 1, 0, 0.5), "batch_size = 0: must be at least 1");
    assert_eq!(new(1, 1, 1, 1.5), "utility_share = 1.5: must be between 0 and 1");
    assert_eq!(new(1, 1, 1, f64::NAN), "utility_share = NaN: must be between 0 and 1");
    assert_eq!(new(1, 0, 1, 0.5), "utility_share = 0.5: must be 0 where there are no utility rows");
    assert_eq!(new(0, 1, 1, 0.5), "utility_share = 0.5: must be 1 where there are no robust rows");
}

#[test]
fn a_split_is_stable_by_name() {
    let names: Vec<String> = (0..2000).map(|index| format!("row {index}")).collect();
    let (training, validation) = split_by_name(&names, 0.25, 1).unwrap();
    assert_eq!(training.len() + validation.len(), 2000);
    // 500 expected, standard deviation 19.
    assert!((420..580).contains(&validation.len()), "{}", validation.len());
    let (_, fewer) = split_by_name(&names[..1000], 0.25, 1).unwrap();
    assert_eq!(fewer, validation.iter().copied().filter(|index| *index < 1000).collect::<Vec<_>>());
    assert_ne!(split_by_name(&names, 0.25, 2).unwrap().1, validation);
    assert!(split_by_name(&names, 0.0, 1).unwrap().1.is_empty());
    assert!(split_by_name(&names, 1.0, 1).unwrap().0.is_empty());
    assert!(split_by_name(&names, 1.1, 1).is_err());
}

/// The numbers that belong to these names were computed with Python's hashlib from the same bytes.
#[test]
fn a_name_decides_alone() {
    let held_out = |name, share| is_held_out(name, share, 5).unwrap();
    assert!(!held_out("boil_echo_syrup", 0.7711) && held_out("boil_echo_syrup", 0.7712));
    assert!(!held_out("chats:3", 0.3115) && held_out("chats:3", 0.3116));
    assert!(!held_out("é", 0.3056) && held_out("é", 0.3057));
    assert!(!held_out("a", 0.0) && held_out("a", 1.0));
    for share in [-0.1, 1.1, f64::NAN] {
        let message = is_held_out("a", share, 5).unwrap_err().to_string();
        assert_eq!(message, format!("validation_share = {share}: must be between 0 and 1"));
    }
}

#[test]
fn a_shuffle_keeps_all_items_and_depends_on_its_names() {
    let order = |seed, purpose, counter| {
        let mut items: Vec<usize> = (0..50).collect();
        shuffle(&mut items, &mut generator(seed, purpose, [counter]));
        items
    };
    let first = order(1, "a", 0);
    assert_eq!(first, order(1, "a", 0));
    for other in [order(2, "a", 0), order(1, "b", 0), order(1, "a", 1)] {
        assert_ne!(first, other);
        let mut sorted = other;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}

#[test]
fn every_place_is_equally_likely() {
    let mut counts = [[0; 3]; 3];
    for counter in 0..6_000 {
        let mut items = [0, 1, 2];
        shuffle(&mut items, &mut generator(0, "x", u64::to_le_bytes(counter)));
        items.iter().enumerate().for_each(|(place, item)| counts[*item][place] += 1);
    }
    // 2000 expected, standard deviation 37.
    assert!(counts.iter().flatten().all(|count| (1_850..2_150).contains(count)), "{counts:?}");
}

#[test]
fn a_pass_of_the_set_that_does_not_define_epochs_is_once_through_it() {
    // 8 robust and 56 utility rows of an update; the 100 utility rows are gone through after 1.8 updates.
    let sampler = sampler(40, 100, 64, 0.875);
    let passes = |source| (0..6).map(|update| sampler.pass_of(source, update)).collect::<Vec<_>>();
    assert_eq!(passes(Source::Utility), [0, 0, 1, 1, 2, 2]);
    assert_eq!(passes(Source::Robust), [0, 0, 0, 0, 0, 1]);
    assert_eq!(passes(Source::Robust), (0..6).map(|update| sampler.epoch_of(update)).collect::<Vec<_>>());
}
