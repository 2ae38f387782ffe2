"""offrl: the shortest trustworthy way from logged decisions to a policy someone may deploy.

The library knows nothing of the orchestrator. Modules import only from lower rows:

    cli
    stages
    training, bundle, reports, selection
    learner, gate, registry, config
    algorithms, ope
    losses, nets, datasets, logs
    schema, storage
"""
