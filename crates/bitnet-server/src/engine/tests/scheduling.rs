//! The scheduler alone: whose turn it is, and what beside what.

use std::sync::Arc;

use bitnet_core::TokenId;

use super::{
    super::{
        GenerationRequest,
        budget::StepRows,
        scheduler::{Scheduler, SchedulerLimits},
        sequence::{Sequence, SequenceId},
        testing::request,
    },
    client,
};
use crate::config::{ClientId, PrefixSharing};

const ANY: StepRows = StepRows { beside_others: usize::MAX, alone: usize::MAX };

fn beside(rows: usize) -> StepRows {
    StepRows { beside_others: rows, ..ANY }
}

/// Steps of a bare scheduler: `keep` says before each step what is submitted; tokens given to each of two clients come back.
fn served(steps: usize, limits: SchedulerLimits, mut keep: impl FnMut(&mut Scheduler, usize)) -> [usize; 2] {
    let mut scheduler = Scheduler::new(limits);
    let mut served = [0; 2];
    for step in 0..steps {
        keep(&mut scheduler, step);
        let shares = scheduler.schedule(ANY).shares;
        let shares: Vec<_> = shares.iter().map(|share| (share.sequence.id, share.num_tokens)).collect();
        for (id, num_tokens) in shares {
            let sequence = scheduler.running().iter().find(|sequence| sequence.id == id).expect("it runs");
            served[usize::from(sequence.request.client == client(1))] += num_tokens;
            let draws = sequence.num_tokens_to_compute() == num_tokens;
            let sequence = scheduler.advance(id, num_tokens, if draws { &[TokenId(1)] } else { &[] });
            if sequence.generated().len() >= sequence.request.max_tokens {
                scheduler.remove(id);
            }
        }
    }
    served
}

fn limits(max_num_seqs: usize) -> SchedulerLimits {
    SchedulerLimits {
        max_num_seqs,
        max_num_batched_tokens: 64,
        num_blocks: 1000,
        max_waiting: 1000,
        prefix_sharing: PrefixSharing::Off,
    }
}

fn sequence(id: usize, client: ClientId, priority: i64, prompt_len: u32, max_tokens: usize) -> Sequence {
    let prompt: Vec<u32> = (0..prompt_len).collect();
    let request = GenerationRequest { client, priority, ..request(&prompt, max_tokens) };
    Sequence::new(SequenceId(id as u64), Arc::new(request), 0)
}

#[test]
fn twenty_requests_get_nobody_more_than_one() {
    let count = |scheduler: &Scheduler, who| {
        scheduler.waiting().chain(scheduler.running()).filter(|sequence| sequence.request.client == who).count()
    };
    // Twenty against five, so that both always want every place.
    let mut id = 0;
    let shares = served(5000, limits(4), |scheduler, _| {
        for (who, wanted) in [(client(0), 20), (client(1), 5)] {
            while count(scheduler, who) < wanted {
                id += 1;
                scheduler.add(sequence(id, who, 0, 30, 20));
            }
        }
    });
    let share = shares[1] as f64 / (shares[0] + shares[1]) as f64;
    assert!((0.45..=0.55).contains(&share), "{shares:?}");
    // Somebody who asks for little never waits for the answers of somebody who asks for much.
    let mut id = 0;
    let mut lone = None;
    served(2000, limits(4), |scheduler, step| {
        while count(scheduler, client(0)) < 20 {
            id += 1;
            scheduler.add(sequence(id, client(0), 0, 30, 200));
        }
        if let Some((lone_id, since)) = lone {
            let first_token = scheduler.running().iter().any(|s| s.id == lone_id && !s.generated().is_empty());
            assert!(first_token || step <= since + 1, "two steps at most: one for the places, one for the prompt");
        }
        if step % 50 == 10 {
            id += 1;
            lone = Some((SequenceId(id as u64), step));
            scheduler.add(sequence(id, client(1), 0, 30, 1000));
        } else if step % 50 == 20 {
            let (id, _) = lone.take().expect("it came");
            scheduler.remove(id);
        }
    });
}

#[test]
fn priority_orders_the_own_requests_only() {
    let mut scheduler = Scheduler::new(limits(1));
    scheduler.add(sequence(1, client(0), 5, 4, 4));
    scheduler.add(sequence(2, client(0), -5, 4, 4));
    assert_eq!(scheduler.schedule(beside(64)).shares[0].sequence.id, SequenceId(2));
    scheduler.add(sequence(3, client(0), -9, 4, 4));
    scheduler.add(sequence(4, client(1), 9, 4, 4));
    scheduler.advance(SequenceId(2), 4, &[TokenId(1)]);
    scheduler.remove(SequenceId(2));
    scheduler.schedule(beside(64));
    let ids: Vec<_> = scheduler.running().iter().map(|sequence| sequence.id).collect();
    assert_eq!(ids, [SequenceId(4), SequenceId(3)], "a priority says nothing to others");
}

/// Tokens that each running sequence gets in the next step, in the order in which they started.
fn next_step(scheduler: &mut Scheduler, step_rows: StepRows) -> Vec<(u64, usize)> {
    let shares = scheduler.schedule(step_rows).shares;
    shares.iter().map(|share| (share.sequence.id.0, share.num_tokens)).collect()
}

#[test]
fn prompts_beside_generating_sequences_are_cut_and_a_probe_waits_for_nobody() {
    let mut scheduler = Scheduler::new(SchedulerLimits { num_blocks: 5, ..limits(1) });
    scheduler.add(sequence(1, client(0), 0, 10, 30));
    assert_eq!(next_step(&mut scheduler, StepRows { alone: 4, ..beside(3) }), [(1, 5)], "two equal parts");
    assert_eq!(next_step(&mut scheduler, StepRows { alone: 6, ..beside(3) }), [(1, 10)], "less than twice the most");
    scheduler.advance(SequenceId(1), 10, &[TokenId(1)]);
    scheduler.add(sequence(2, client(1), 0, 30, 30));
    assert_eq!(next_step(&mut scheduler, beside(21)), [(1, 1), (2, 20)]);
    assert_eq!(next_step(&mut scheduler, beside(3)), [(1, 1), (2, 16)], "a step has some use");
    scheduler.add(Sequence { is_probe: true, ..sequence(3, client(2), 0, 1, 1) });
    scheduler.add(Sequence { is_probe: true, ..sequence(4, client(2), 0, 20, 1) });
    let ids: Vec<_> = next_step(&mut scheduler, beside(3)).into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids[..2], [4, 3], "without places or blocks");
}

#[test]
fn others_wait_one_step_for_the_prompt_of_a_client_far_behind() {
    let mut scheduler = Scheduler::new(SchedulerLimits { max_num_batched_tokens: 2000, ..limits(4) });
    let rows = StepRows { beside_others: 20, alone: 30 };
    scheduler.add(sequence(1, client(0), 0, 1500, 30));
    scheduler.schedule(ANY);
    scheduler.advance(SequenceId(1), 1500, &[TokenId(1)]);
    scheduler.add(sequence(2, client(0), 0, 40, 30));
    assert_eq!(next_step(&mut scheduler, rows), [(1, 1), (2, 19)], "its own prompts are no others'");
    scheduler.add(sequence(3, client(1), 0, 100, 30));
    assert_eq!(next_step(&mut scheduler, rows), [(3, 34)], "alone");
    scheduler.advance(SequenceId(3), 34, &[]);
    assert_eq!(next_step(&mut scheduler, rows), [(1, 1), (3, 19)], "then beside the others, before their prompts");
    scheduler.advance(SequenceId(3), 19, &[]);
    assert_eq!(next_step(&mut scheduler, rows), [(3, 47)]);
    scheduler.advance(SequenceId(3), 47, &[TokenId(1)]);
    assert_eq!(next_step(&mut scheduler, rows), [(1, 1), (2, 18), (3, 1)]);
    scheduler.add(sequence(4, client(1), 0, 600, 30));
    let shares = next_step(&mut scheduler, StepRows { alone: 1000, ..rows });
    assert_eq!(shares, [(1, 1), (3, 1), (4, 18)], "it would be ahead of the others with it");
}
