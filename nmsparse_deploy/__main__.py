from nmsparse_deploy.cli import main

main()
