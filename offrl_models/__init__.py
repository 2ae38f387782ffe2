"""offrl: the shortest trustworthy way from logged decisions to a policy someone may deploy.

The library knows nothing of the orchestrator. Modules import only from lower rows:

    cli
    stages
    reports, selection
    evaluation
    training, bundle
    config
    learner, gate, registry
    algorithms, ope
    policies
    losses, nets, datasets, logs
    schema, storage, progress
"""
