"""The demonstration: a whole federation on one machine, as separate processes, on real health data.

It uses what everybody uses: kits from `provisioning`, the roles through the command line, the job through the client.
"""
