//! What the framework does around every attack: starts, restarts, warm starts, and what it refuses.

#[path = "common/attacks.rs"]
mod attacks;
#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    AttackRunner, AttackSettings, Batch, ContinuationKind, Draws, EmbeddingAttack, Iterate, Perturbation, Pgd, Place,
    Probe, Region, Result, Site, Start, StepSize, TargetCrossEntropy, ThreatModel,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use attacks::{RADIUS, assert_never_worse, harmful_loss, row, run, sizes, steps, threat};
use rand_distr::StandardNormal;
use toy::{Bigram, HIDDEN, attacked, batch, decoder, robust};

/// Returns where it was told to start, `factor` times as long.
struct Starts {
    threat: ThreatModel,
    factor: f64,
}

impl EmbeddingAttack for Starts {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        Ok(vec![probe.start()?.map(|values| Ok(values * self.factor))?])
    }
}

fn starts(start: Start, numbers: &[usize], draws: Draws) -> Perturbation {
    let mut attack = Starts { threat: threat(), factor: 1.0 };
    let settings = AttackSettings { start, ..AttackSettings::default() };
    let (model, rows) = (Bigram::new(), batch(numbers.iter().map(|number| robust(*number)).collect()));
    let mut runner = AttackRunner::new(settings, &attack, &model).unwrap();
    runner.run(&mut attack, &mut TargetCrossEntropy, &model, &rows, draws).unwrap().perturbations.remove(0)
}

#[test]
fn random_starts_are_spread_over_the_ball_and_belong_to_the_row() {
    let draws = Draws { seed: 1, epoch: 0 };
    let many: Vec<usize> = (0..60).collect();
    // Uniform in a ball of d dimensions: the d-th power of the length is uniform from 0 to 1.
    let shares: Vec<f64> = sizes(&starts(Start::Uniform, &many, draws)).iter().map(|one| one / RADIUS).collect();
    assert!(shares.iter().all(|share| *share <= 1.0 + 1e-12));
    let mean = shares.iter().map(|share| share.powi(HIDDEN as i32)).sum::<f64>() / shares.len() as f64;
    assert!((mean - 0.5).abs() < 4.0 * (12.0 * shares.len() as f64).sqrt().recip(), "{mean}");
    for start in [Start::Uniform, Start::Gaussian] {
        let together = starts(start, &[0, 1, 2], draws);
        assert_eq!(row(&together, 1), row(&starts(start, &[4, 0, 1], draws), 2));
        assert_ne!(row(&together, 0), row(&together, 1)[..row(&together, 0).len()]);
        for other in [Draws { epoch: 1, ..draws }, Draws { seed: 2, ..draws }] {
            assert_ne!(row(&together, 1), row(&starts(start, &[0, 1, 2], other), 1));
        }
    }
    assert!(sizes(&starts(Start::Zero, &[0, 1], draws)).iter().all(|size| *size == 0.0));
}

#[test]
fn what_lies_outside_the_ball_is_projected() {
    let settings = AttackSettings { start: Start::Gaussian, ..AttackSettings::default() };
    let rows = batch((0..3).map(robust).collect());
    let run = |bounded| {
        let mut attack = Starts { threat: ThreatModel { bounded, ..threat() }, factor: 100.0 };
        run(&mut attack, &settings, &Bigram::new(), &rows)
    };
    let inside = run(true);
    for size in sizes(&inside.perturbations[0]) {
        assert_relative_eq!(size, RADIUS, max_relative = 1e-12);
    }
    assert_eq!(inside.statistics.tokens_at_edge, inside.statistics.tokens);
    let outside = run(false);
    assert!(sizes(&outside.perturbations[0]).iter().all(|size| *size > 10.0 * RADIUS));
    assert_eq!(outside.statistics.tokens_at_edge, outside.statistics.tokens, "beyond the edge counts as at it");
}

#[test]
fn restarts_and_the_best_iterate_never_make_it_worse() {
    let (model, rows) = (decoder(), batch((0..6).map(robust).collect()));
    // Steps too long to settle: the last iterate is seldom the best.
    let losses = |restarts, iterate| {
        let settings = AttackSettings { start: Start::Uniform, restarts, iterate, ..AttackSettings::default() };
        let outcome = run(&mut steps(StepSize::Constant(1.5)), &settings, &model, &rows);
        let losses = harmful_loss(&model, &rows, &outcome.perturbations[0]);
        (losses, outcome.statistics)
    };
    let (one, _) = losses(1, Iterate::Last);
    let (four, statistics) = losses(4, Iterate::Last);
    let (best, _) = losses(1, Iterate::Best);
    assert_never_worse(&four, &one);
    assert_never_worse(&best, &one);
    assert_relative_eq!(statistics.objective_last, four.iter().sum::<f64>(), max_relative = 1e-9);
    // Five steps, and one pass to compare what they ended with, four times.
    assert_eq!((statistics.forward_passes, statistics.backward_passes), (24, 20));
    let attacked = Batch::of_kind(rows.examples(), ContinuationKind::Harmful, rows.device()).unwrap();
    assert_eq!(statistics.pass_tokens, 24 * attacked.layout().tokens() as u64);
}

#[test]
fn a_warm_start_begins_where_the_rows_last_attack_ended() {
    let (model, mut attack) = (decoder(), steps(StepSize::Constant(0.3)));
    let settings = AttackSettings { warm_start: true, ..AttackSettings::default() };
    let mut runner = AttackRunner::new(settings, &attack, &model).unwrap();
    let mut run = |attack: &mut dyn EmbeddingAttack, rows: &[usize], epoch| {
        let rows = batch(rows.iter().map(|number| robust(*number)).collect());
        let outcome = runner.run(attack, &mut TargetCrossEntropy, &model, &rows, Draws { seed: 0, epoch });
        outcome.unwrap().perturbations.remove(0)
    };
    let ended = run(&mut attack, &[0, 1, 2], 0);
    let begun = run(&mut Starts { threat: threat(), factor: 1.0 }, &[4, 2, 0], 1);
    assert!(row(&begun, 0).iter().all(|one| *one == 0.0), "a row that was never attacked starts at zero");
    assert_eq!(row(&begun, 1), row(&ended, 2));
    assert_eq!(row(&begun, 2), row(&ended, 0));
    assert!(row(&ended, 0).iter().any(|one| *one != 0.0));
}

/// Returns perturbations of the first token of each row and of nothing else, `sizes` long.
struct FirstTokens {
    threat: ThreatModel,
    sizes: Vec<f64>,
}

impl EmbeddingAttack for FirstTokens {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let places: Vec<Place> = probe.places().iter().filter(|place| place.offset == 0).copied().collect();
        let unit = Tensor::ones([places.len() as i64, HIDDEN], (Kind::Double, Device::Cpu)) / (HIDDEN as f64).sqrt();
        let of = |size: &f64| Perturbation::new(places.clone(), vec![(Site::Embeddings, &unit * *size)]);
        self.sizes.iter().map(of).collect()
    }
}

#[test]
fn a_warm_start_keeps_the_last_of_several_perturbations_where_it_perturbed() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let settings = AttackSettings { warm_start: true, ..AttackSettings::default() };
    let mut runner = AttackRunner::new(settings, &Pgd { threat: threat(), ..Pgd::default() }, &model).unwrap();
    let mut run = |attack: &mut dyn EmbeddingAttack| {
        let draws = Draws { seed: 0, epoch: 0 };
        runner.run(attack, &mut TargetCrossEntropy, &model, &rows, draws).unwrap().perturbations
    };
    let ended = run(&mut FirstTokens { threat: threat(), sizes: vec![0.1, 0.2] });
    assert_eq!((ended.len(), ended[0].places().len()), (2, 3));
    let begun = run(&mut Starts { threat: threat(), factor: 1.0 }).remove(0);
    for (place, size) in begun.places().iter().zip(sizes(&begun)) {
        assert_relative_eq!(size, if place.offset == 0 { 0.2 } else { 0.0 }, max_relative = 1e-12);
    }
}

/// Returns, or first tries, or takes the gradient at, a perturbation that it was not allowed.
struct Astray {
    threat: ThreatModel,
    place: Option<Place>,
    site: Site,
    with: fn(&mut Probe, &Perturbation) -> Result<()>,
}

impl EmbeddingAttack for Astray {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut places = probe.places()[..1].to_vec();
        places.extend(self.place);
        let values = Tensor::zeros([places.len() as i64, HIDDEN], (Kind::Double, Device::Cpu));
        let found = Perturbation::new(places, vec![(self.site, values)])?;
        (self.with)(probe, &found)?;
        Ok(vec![found])
    }
}

#[test]
fn what_lies_outside_region_or_sites_is_refused() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let threat = ThreatModel { region: Region::UserContent, sites: vec![Site::Block(1)], ..threat() };
    let run = |place, site, with| {
        let mut attack = Astray { threat: threat.clone(), place, site, with };
        let settings = AttackSettings::default();
        attacked(&mut attack, &mut TargetCrossEntropy, settings, &model, &rows).map(|_| ()).map_err(|e| e.to_string())
    };
    let ways: [fn(&mut Probe, &Perturbation) -> Result<()>; 3] = [
        |_, _| Ok(()),
        |probe, found| probe.value(found).map(|_| ()),
        |probe, found| probe.gradient(found).map(|_| ()),
    ];
    for with in ways {
        assert!(run(None, Site::Block(1), with).is_ok());
        // A token of the template, and a row that is not there.
        for place in [Place { row: 1, offset: 0 }, Place { row: 3, offset: 2 }] {
            let error = run(Some(place), Site::Block(1), with).unwrap_err();
            assert!(error.contains("UserContent") && error.contains(&format!("{place:?}")), "{error}");
        }
        for site in [Site::Embeddings, Site::Block(0)] {
            let error = run(None, site, with).unwrap_err();
            assert!(error.contains("[Block(1)]") && error.contains(&format!("found {site:?}")), "{error}");
        }
    }
}

/// A random point, mostly at the edge of the ball.
struct Random(ThreatModel);

impl EmbeddingAttack for Random {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let radius = probe.radius();
        Ok(vec![probe.draw(&StandardNormal)?.map(|values| Ok(values * radius))?])
    }

    fn is_random(&self) -> bool {
        true
    }
}

#[test]
fn restarts_that_would_end_alike_are_refused_and_others_are_not() {
    let (model, rows) = (decoder(), batch((0..4).map(robust).collect()));
    let settings = |start, restarts, warm_start, dropout| AttackSettings {
        start,
        restarts,
        warm_start,
        dropout,
        ..AttackSettings::default()
    };
    let (zero, uniform) = (Start::Zero, Start::Uniform);
    let (pgd, boxed) = (Pgd::default(), Box::new(Random(threat())) as Box<dyn EmbeddingAttack>);
    for (attack, settings, most) in [
        (&pgd as &dyn EmbeddingAttack, settings(zero, 2, false, false), Some(1)),
        (&pgd, settings(zero, 2, true, false), None),
        (&pgd, settings(zero, 3, true, false), Some(2)),
        (&pgd, settings(zero, 3, false, true), None),
        (&pgd, settings(uniform, 3, false, false), None),
        (&boxed, settings(zero, 3, false, false), None),
    ] {
        let what = format!("{settings:?}");
        let restarts = settings.restarts;
        let made = AttackRunner::new(settings, attack, &model).map(|_| ());
        match most {
            None => made.unwrap_or_else(|error| panic!("{what}: {error}")),
            Some(most) => {
                let error = made.expect_err(&what).to_string();
                let expected = format!("attack_settings.restarts = {restarts}: must be at most {most} where");
                assert!(error.starts_with(&expected), "{error}");
            }
        }
    }
    // They do end apart: the best of four is better.
    let losses = |restarts| {
        let outcome = run(&mut Random(threat()), &settings(zero, restarts, false, false), &model, &rows);
        harmful_loss(&model, &rows, &outcome.perturbations[0])
    };
    assert_never_worse(&losses(4), &losses(1));
}

#[test]
fn an_attack_that_returns_nothing_is_refused() {
    let mut nothing = FirstTokens { threat: threat(), sizes: Vec::new() };
    let rows = batch(vec![robust(1)]);
    let settings = AttackSettings::default();
    let error = attacked(&mut nothing, &mut TargetCrossEntropy, settings, &decoder(), &rows).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "perturbations of an attack: expected at least one, found 0");
}

/// Tries to move the first token of each row, then the second, and returns the first one tried.
struct OneByOne(ThreatModel);

impl EmbeddingAttack for OneByOne {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut first = None;
        for (offset, site) in [(0, Site::Embeddings), (1, Site::Block(1))] {
            let places: Vec<_> = probe.places().iter().copied().filter(|place| place.offset == offset).collect();
            let values = Tensor::full([places.len() as i64, HIDDEN], 0.3, (Kind::Double, Device::Cpu));
            let candidate = Perturbation::new(places, vec![(site, values)])?;
            let _ = probe.value(&candidate)?;
            first.get_or_insert(candidate);
        }
        Ok(first.into_iter().collect())
    }
}

#[test]
fn candidates_at_other_places_and_sites_are_compared_row_by_row() {
    let (model, rows) = (decoder(), batch((0..6).map(robust).collect()));
    let threat = ThreatModel { sites: vec![Site::Embeddings, Site::Block(1)], ..threat() };
    let settings = AttackSettings { iterate: Iterate::Best, ..AttackSettings::default() };
    let best = run(&mut OneByOne(threat.clone()), &settings, &model, &rows).perturbations.remove(0);
    let [first, second] = [(0, Site::Embeddings), (1, Site::Block(1))].map(|(offset, site)| {
        let places: Vec<_> = (0..6).map(|row| Place { row, offset }).collect();
        let values = Tensor::full([6, HIDDEN], 0.3, (Kind::Double, Device::Cpu));
        // Longer than the radius, so it is the projected one that was tried.
        let candidate = Perturbation::new(places, vec![(site, values)]).unwrap();
        harmful_loss(&model, &rows, &threat.project(&candidate, RADIUS).unwrap())
    });
    let expected: Vec<f64> = first.iter().zip(&second).map(|(first, second)| first.min(*second)).collect();
    assert!(expected != first && expected != second, "{first:?}, {second:?}");
    attacks::assert_near("best", &harmful_loss(&model, &rows, &best), &expected);
}
