//! Runs that stop and go on, and what they refuse to go on from.

#[path = "common/runs.rs"]
mod runs;
#[path = "common/toy.rs"]
mod toy;

use std::{
    fs,
    sync::{Arc, atomic::AtomicBool},
};

use advtrain::{
    AdvIpoLoss, AdvUlLoss, AdversarialTrainer, AttackSettings, Decoder, Finish, OptimizerConfig, Pgd, Radius, Site,
    Start, SupervisedLoss, ThreatModel, TrainSettings, TrainerBuilder,
};
use runs::{alone, mixed, run_to_end, settings, weights};
use toy::{StopAfter, useful, with_lora};

/// C-AdvUL with everything that draws random numbers on: dropout in both places, a random start, warm starts.
fn random_run() -> TrainerBuilder<Decoder> {
    random_run_of(with_lora(0.3))
}

fn random_run_of(model: Decoder) -> TrainerBuilder<Decoder> {
    let around =
        AttackSettings { start: Start::Gaussian, warm_start: true, dropout: true, ..AttackSettings::default() };
    AdversarialTrainer::builder(model)
        .attack(Pgd { steps: 2, ..Pgd::default() }, around)
        .robust(AdvUlLoss::default())
        .utility(SupervisedLoss::default())
        .data(mixed())
        .settings(settings())
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_another() {
    let _turn = alone();
    let run = |seed| {
        let mut trainer = random_run().settings(TrainSettings { seed, ..settings() }).build().unwrap();
        run_to_end(&mut trainer)
    };
    let first = run(11);
    assert!(first != weights(&with_lora(0.3)), "nothing was trained");
    assert!(first == run(11), "the same seed");
    assert!(first != run(12), "another seed");
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let _turn = alone();
    let whole = run_to_end(&mut random_run().build().unwrap());
    for stop_after in [1, 3, 4] {
        let folder = tempfile::tempdir().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let mut first = random_run().folder(folder.path()).build().unwrap();
        first.observe(StopAfter(stop_after, stop.clone()));
        assert_eq!(first.run(&stop).unwrap(), Finish::Stopped);
        assert_eq!(first.updates_done(), stop_after);
        let mut second = random_run().folder(folder.path()).build().unwrap();
        assert_eq!(second.resume().unwrap(), stop_after);
        assert!(run_to_end(&mut second) == whole, "stopped after {stop_after}");
    }
}

#[test]
fn what_a_run_draws_matters() {
    let _turn = alone();
    let whole = run_to_end(&mut random_run().build().unwrap());
    let pgd = || Pgd { steps: 2, ..Pgd::default() };
    let around =
        |warm_start, dropout| AttackSettings { start: Start::Gaussian, warm_start, dropout, ..Default::default() };
    for (what, builder) in [
        ("warm starts", random_run().attack(pgd(), around(false, true))),
        ("dropout in the attack", random_run().attack(pgd(), around(true, false))),
        ("dropout in the loss", random_run().settings(TrainSettings { dropout: false, ..settings() })),
    ] {
        assert!(run_to_end(&mut builder.build().unwrap()) != whole, "{what} changes nothing");
    }
}

/// C-AdvIPO, whose reference values a resumed run reads from the folder.
fn preference_run() -> TrainerBuilder<Decoder> {
    random_run().robust(AdvIpoLoss::default())
}

/// Warm starts at several sites.
fn latent_run() -> TrainerBuilder<Decoder> {
    let threat = ThreatModel {
        sites: vec![Site::Embeddings, Site::Block(1), Site::Block(0)],
        radius: Radius::Absolute(0.5),
        ..ThreatModel::default()
    };
    let around = AttackSettings { warm_start: true, ..AttackSettings::default() };
    random_run().attack(Pgd { steps: 1, threat, ..Pgd::default() }, around)
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint_as_if_it_had_not_been() {
    let _turn = alone();
    for run in [random_run, preference_run, latent_run] {
        let whole = run_to_end(&mut run().build().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let mut killed = run().folder(folder.path()).build().unwrap();
        for _ in 0..3 {
            killed.step().unwrap();
            if killed.updates_done() == 2 {
                killed.save_checkpoint().unwrap();
            }
        }
        drop(killed);
        let mut second = run().folder(folder.path()).build().unwrap();
        assert_eq!(second.resume().unwrap(), 2);
        assert!(run_to_end(&mut second) == whole);
    }
}

#[test]
fn a_folder_is_of_one_run_until_that_ends() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let build = || random_run().folder(folder.path()).build().unwrap();
    let mut first = build();
    first.resume().unwrap();
    let mut second = build();
    let path = folder.path().display().to_string();
    for error in [second.resume().unwrap_err(), second.run(&AtomicBool::new(false)).unwrap_err()] {
        let error = error.to_string();
        assert!(error.starts_with(&path) && error.contains("another process is at work"), "{error}");
    }
    assert_eq!(second.updates_done(), 0);
    assert_eq!(first.run(&AtomicBool::new(true)).unwrap(), Finish::Stopped);
    second.resume().unwrap();
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_the_difference_named() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut first = random_run().folder(folder.path()).build().unwrap();
    first.step().unwrap();
    first.save_checkpoint().unwrap();
    let busy = random_run().folder(folder.path()).build().unwrap().save_checkpoint().unwrap_err().to_string();
    assert!(busy.contains("another process is at work"), "{busy}");
    drop(first);
    let resume = |builder: TrainerBuilder<Decoder>| builder.folder(folder.path()).build().unwrap().resume();
    assert_eq!(resume(random_run()).unwrap(), 1);
    let with = |settings| random_run().settings(settings);
    let saved_more_often = TrainSettings { checkpoint_every: 1, keep_checkpoints: 5, ..settings() };
    assert_eq!(resume(with(saved_more_often)).unwrap(), 1);
    let around = || AttackSettings { start: Start::Gaussian, warm_start: true, dropout: true, ..Default::default() };
    let three_steps = Pgd { steps: 3, ..Pgd::default() };
    let mut other_model = toy::decoder_of_seed(4);
    other_model.add_lora(&toy::lora(0.3), 5).unwrap();
    let mut other_start = toy::decoder();
    other_start.add_lora(&toy::lora(0.3), 6).unwrap();
    let mut other_data = mixed();
    other_data.utility[0] = useful(17);
    let shorter = OptimizerConfig { learning_rate: 1e-3, ..settings().optimizer };
    for (builder, expected) in [
        (with(TrainSettings { seed: 12, ..settings() }), "train.seed was 11 and not 12"),
        (with(TrainSettings { max_updates: Some(5), ..settings() }), "number of updates was 6 and not 5"),
        (with(TrainSettings { optimizer: shorter, ..settings() }), "train.optimizer.learning_rate was 0.01"),
        (random_run().attack(three_steps, around()), "steps: 3"),
        (random_run().attack(Pgd { steps: 2, ..Pgd::default() }, AttackSettings::default()), "attack settings was"),
        (random_run().robust(AdvUlLoss { away_weight: 0.7, ..Default::default() }), "robust loss was"),
        (random_run().utility(SupervisedLoss { weight: 2.0, ..Default::default() }), "utility loss was"),
        (random_run().data(other_data), "utility rows was"),
        (random_run_of(with_lora(0.2)), "adapter was"),
        (random_run_of(other_model), "original model was"),
        (random_run_of(other_start), "weights to train, at the start was"),
    ] {
        let error = resume(builder).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}

#[test]
fn a_checkpoint_under_another_number_and_damaged_reference_values_are_refused() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let build = || preference_run().folder(folder.path()).build();
    let mut first = build().unwrap();
    first.step().unwrap();
    first.save_checkpoint().unwrap();
    drop(first);
    let checkpoints = folder.path().join("checkpoints");
    fs::rename(checkpoints.join("update-000001"), checkpoints.join("update-000004")).unwrap();
    let error = build().unwrap().resume().unwrap_err().to_string();
    assert!(error.contains("update-000004") && error.contains("update = 1: in this folder it must be 4"), "{error}");
    let reference = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let reference = reference.into_iter().find(|path| path.display().to_string().contains("reference-")).unwrap();
    let mut values: serde_json::Value = serde_json::from_slice(&fs::read(&reference).unwrap()).unwrap();
    let (id, of_row) = values.as_object_mut().unwrap().iter_mut().next().unwrap();
    let (id, name) = (id.clone(), of_row.as_object().unwrap().keys().next().unwrap().clone());
    for numbers in [serde_json::json!([]), serde_json::json!(vec![1.0; 50])] {
        values[&id][&name] = numbers;
        fs::write(&reference, values.to_string()).unwrap();
        let error = build().err().unwrap().to_string();
        assert!(error.contains("reference-") && error.contains("1 for the row"), "{error}");
    }
}

#[test]
fn a_folder_with_checkpoints_is_not_written_to_without_going_on_from_them() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    run_to_end(&mut random_run().folder(folder.path()).build().unwrap());
    let mut second = random_run().folder(folder.path()).build().unwrap();
    for error in [second.run(&AtomicBool::new(false)).unwrap_err(), second.save_checkpoint().unwrap_err()] {
        assert!(error.to_string().contains("update-000006") && error.to_string().contains("resume"), "{error}");
    }
    assert_eq!(second.updates_done(), 0);
}
